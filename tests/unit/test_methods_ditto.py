"""Ditto: FedAvg for what is sent, a personal model that lambda pulls to what was received."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import run_tiny, tiny
from toy import toy_context, toy_lanes, toy_net

from fedtailor.core.errors import Interrupted
from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.params import LaneParams
from fedtailor.methods import build_method
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.digest import digest

HOW = {"lr": 5e-3, "batch_size": 4, "epochs": 2, "dropout": 0.1}
RUN = (
    "methods=[ditto]", "base.name=none", "strategy.rounds=3", "ditto.lr=1e-2", "ditto.batch_size=64", "ditto.lam=0.1",
)  # fmt: skip


def rows(params: LaneParams, prefix: str) -> torch.Tensor:
    """Parameters of this prefix, (K, P)."""
    named = [s.name for s in params.specs if s.name.startswith(prefix)]
    return torch.cat([params[name].detach().flatten(1) for name in named], 1)


def played(ctx: ClientContext, lam: float) -> dict[str, torch.Tensor]:
    report = build_method("ditto", HOW | {"lam": lam}, 3).local_update(ctx)
    return dict(report.metrics)


def context(fresh: tuple[bool, ...] = (True, True, True)) -> ClientContext:
    """Three clients; those that are not fresh have a personal model of their own."""
    method = build_method("ditto", HOW, 3)
    ctx = toy_context(toy_net(), toy_lanes([9, 8, 3]), method.adapter)
    ctx = replace(ctx, fresh=torch.tensor(fresh))
    own = ctx.params.flat(Scope.PRIVATE)
    draw = torch.randn(own.shape, generator=torch.Generator().manual_seed(5), dtype=own.dtype) * 0.1
    with torch.no_grad():
        own.copy_(torch.where(ctx.fresh.unsqueeze(1), own, draw))
    return ctx


def test_what_is_sent_is_fedavgs_whatever_lambda() -> None:
    fedavg = build_method("fedavg", HOW | {"adapter": "lora", "rank": 3}, 3)
    plain = toy_context(toy_net(), toy_lanes([9, 8, 3]), fedavg.adapter)
    expected = fedavg.local_update(plain).metrics["train_loss"]
    for lam in (0.0, 1.0):
        ctx = context()
        metrics = played(ctx, lam)
        assert torch.equal(rows(ctx.params, "global"), rows(plain.params, "lora"))
        assert torch.equal(metrics["train_loss"], expected)


def test_without_the_pull_a_fresh_client_trains_the_same_model_twice() -> None:
    ctx = context()
    metrics = played(ctx, 0.0)
    assert torch.equal(rows(ctx.params, "personal"), rows(ctx.params, "global"))
    assert torch.equal(metrics["personal_train_loss"], metrics["train_loss"])


def test_a_larger_lambda_ends_nearer_to_what_was_received() -> None:
    drifts = [played(context((True, False, False)), lam)["personal_drift"] for lam in (0.0, 1.0, 100.0)]
    assert (drifts[0] > drifts[1]).all()
    assert (drifts[1] > drifts[2]).all()


def test_a_client_that_returns_goes_on_from_its_own_model() -> None:
    fresh, mixed = context(), context((True, False, True))
    before = rows(mixed.params, "personal").clone()
    start = rows(fresh.params, "personal").clone()
    assert torch.equal(before[0], start[0])
    assert not torch.equal(before[1], start[1])
    played(fresh, 1.0)
    played(mixed, 1.0)
    after, other = rows(mixed.params, "personal"), rows(fresh.params, "personal")
    torch.testing.assert_close(after[[0, 2]], other[[0, 2]], rtol=1e-9, atol=1e-12)
    assert (after[1] - before[1]).norm() < (after[1] - start[1]).norm(), "it did not start from what was received"


def test_a_fresh_client_starts_from_what_it_received_not_from_the_initial_values() -> None:
    ctx = context()
    sent = torch.randn(1, ctx.params.flat(Scope.SHARED).shape[1], dtype=torch.float64) * 0.1
    ctx = replace(ctx, received=type(ctx.received)(ctx.params.of_scope(Scope.SHARED), sent, [0, 0, 0]))
    ctx.params.flat(Scope.SHARED).detach().copy_(sent.expand(3, -1))
    played(ctx, 0.0)
    assert torch.equal(rows(ctx.params, "personal"), rows(ctx.params, "global"))


def commits(run: Any) -> list[Any]:
    return [CommitLog(run.storage, f"artifacts/{stage['artifact']}").all() for stage in run.stages("strategy")]


def test_personal_models_are_kept_used_and_resumed(tmp_path: Path) -> None:
    clean = run_tiny(tiny(tmp_path / "clean", *RUN))
    calls, cut = iter(range(1000)), tiny(tmp_path / "cut", *RUN)
    with pytest.raises(Interrupted):
        run_tiny(cut, should_stop=lambda: next(calls) >= 5)
    assert digest(run_tiny(cut).storage, "run") == digest(clean.storage, "run")
    per_budget = commits(clean)
    assert len(per_budget) == 2, "one training for each budget"
    for log in per_budget:
        for before, after in pairwise(log):
            stays = set(before.record["private_at"]) - set(after.record["cohort"])
            assert all(after.record["private_at"][c] == before.record["private_at"][c] for c in stays)
    frame = clean.metrics("personalise")
    assert set(frame[frame.metric == "accuracy"].groupby("client").budget.nunique()) == {2}
    drift = frame[frame.metric == "personal_drift"].value
    assert (drift > 0).all()
