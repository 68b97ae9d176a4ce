"""HETLoRA: HOMLoRA where ranks are equal and nothing is penalised; else truncated, penalised, pruned, weighted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load
from tiny import run_tiny, tiny
from toy import toy_context, toy_lanes, toy_net

from fedtailor.aggregation.frobenius import FrobeniusMean
from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.experiment.plan import make_plan
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method
from fedtailor.federated.ranks import Ranks
from fedtailor.methods import build_method
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.round_store import SHARED

LIST = {"name": "list", "values": [4, 3, 2, 1]}
HOW: dict[str, Any] = {"lr": 5e-3, "batch_size": 4, "local_steps": 3, "targets": ["query", "value"], "ranks": LIST}
RUN = ("base.name=none", "task.languages=[eng,yor]", "task.clients_per_language=2", "strategy.rounds=2",
       "strategy.cohort=4")  # fmt: skip


def hetlora(**cfg: object) -> Method:
    return build_method("hetlora", HOW | cfg, 4)


def context(method: Method, learned: bool = True, kept: tuple[int, ...] = (0, 0, 0)) -> ClientContext:
    """Three clients at what the server has, once it has learned something."""
    ctx = toy_context(toy_net(), toy_lanes([9, 8, 3]), method.adapter, method.modules)
    with torch.no_grad():
        for spec in ctx.params.specs:
            if learned and "_B." in spec.name:
                ctx.params[spec.name].normal_(0, 0.1, generator=torch.Generator().manual_seed(5))
    ctx.params.set("rank", torch.tensor(kept).unsqueeze(1))
    assert method.downlink is not None
    method.downlink(ctx)
    return ctx


def kept_rows(ctx: ClientContext) -> list[int]:
    """Ranks of each lane that are not zero in A."""
    return (ctx.params["lora_A.bert.encoder.layer.0.attention.self.query"] != 0).any(2).sum(1).tolist()


@pytest.mark.parametrize("mean", ["plain", "examples"])
def test_with_equal_ranks_no_penalty_and_equal_weights_it_is_homlora(tmp_path: Path, mean: str) -> None:
    same = ("lr=5e-3", "batch_size=8", "local_steps=3", f"mean={mean}")
    own = ("ranks={name: formula, r_min: 3, r_max: 3}", "penalty=0", "weights=mean", "prune=false")
    words = [f"{name}.{word}" for name in ("homlora", "hetlora") for word in same]
    run = run_tiny(
        tiny(tmp_path, *RUN, "methods=[homlora,hetlora]", "homlora.rank=3", *words, *(f"hetlora.{w}" for w in own))
    )
    logs = [CommitLog(run.storage, f"artifacts/{stage['artifact']}").all() for stage in run.stages("strategy")]
    for mine, theirs in zip(*logs, strict=True):
        found, expected = mine.tensors(SHARED), theirs.tensors(SHARED)
        assert list(found) == list(expected)
        assert all(np.array_equal(found[name], expected[name]) for name in found)
    frame = run.metrics("personalise")
    losses = [frame[(frame.method == m) & (frame.metric == "loss")].value.tolist() for m in ("homlora", "hetlora")]
    assert losses[0] == losses[1]


def test_a_client_is_sent_as_many_ranks_as_it_has() -> None:
    ctx = context(hetlora())
    assert kept_rows(ctx) == [4, 3, 2]
    b = ctx.params["lora_B.bert.encoder.layer.1.attention.self.value"]
    assert (b != 0).any(1).sum(1).tolist() == [4, 3, 2]
    method = hetlora()
    assert method.downlink is not None
    homlora = [build_method("homlora", {"rank": r, "targets": ("query", "value")}, 4) for r in (4, 3, 2)]
    sizes = [sum(s.size for s in m.adapter.specs(ctx.net)) for m in homlora if m.adapter]
    assert list(method.downlink(context(method))) == sizes
    assert kept_rows(context(hetlora(), kept=(0, 1, 0))) == [4, 1, 2], "what it was pruned to counts from then on"


def test_a_client_whose_tail_shrinks_prunes_it_and_no_further_than_r_min() -> None:
    method = hetlora(penalty=50.0, gamma=0.5, prune=True, optimizer="sgd", lr=1e-4)
    ctx = context(method)
    assert method.local_update is not None
    report = method.local_update(ctx)
    assert report.metrics["rank"].tolist() == [2, 1, 1]
    assert kept_rows(ctx) == [2, 1, 1]
    assert ctx.params["rank"].flatten().tolist() == [2, 1, 1]
    floor = {"name": "formula", "r_min": 3, "r_max": 4}
    method = hetlora(penalty=50.0, gamma=0.5, optimizer="sgd", lr=1e-4, ranks=floor)
    assert method.local_update is not None
    assert set(method.local_update(context(method)).metrics["rank"].tolist()) == {3}


def test_a_tail_that_grows_or_stays_is_not_pruned() -> None:
    grows = hetlora(penalty=0.0)
    assert grows.local_update is not None
    ctx = context(grows, learned=False)
    assert grows.local_update(ctx).metrics["rank"].tolist() == [4, 3, 2]
    assert bool(torch.isfinite(ctx.params.flat(Scope.SHARED)).all()), "|B| = 0 has a gradient of 0"
    stays = hetlora(penalty=0.0, gamma=1.0)
    assert stays.local_update is not None
    report = stays.local_update(context(stays))
    assert report.metrics["tail"].tolist() == [0.0] * 3
    assert report.metrics["rank"].tolist() == [4, 3, 2]


def test_the_penalty_is_the_gradient_of_the_sum_over_modules_of_products_of_norms() -> None:
    methods = [
        hetlora(penalty=p, prune=False, optimizer="sgd", lr=1.0, weight_decay=0, local_steps=1) for p in (0, 0.3)
    ]
    rows = []
    for method in methods:
        ctx = context(method)
        assert method.local_update is not None
        method.local_update(ctx)
        rows.append(ctx)
    start, name = context(methods[0]), "bert.encoder.layer.0.attention.self.query"
    a, b = start.params[f"lora_A.{name}"][0].detach(), start.params[f"lora_B.{name}"][0].detach()
    moved = rows[0].params[f"lora_A.{name}"][0] - rows[1].params[f"lora_A.{name}"][0]
    expected = torch.zeros_like(a)
    expected[3] = 0.3 * b[:, 3].norm() * a[3] / a[3].norm()  # floor(.99 * 4) = 3: the last of four ranks
    torch.testing.assert_close(moved, expected, rtol=1e-7, atol=1e-10)


def test_moments_of_pruned_ranks_do_not_move_them() -> None:
    method = hetlora(penalty=0.0, prune=False)
    ctx = context(method, kept=(2, 2, 2))
    for name in ("adam.first", "adam.second", "adam.steps"):
        ctx.params.set(name, torch.ones_like(ctx.params[name]))
    assert method.local_update is not None
    method.local_update(ctx)
    assert kept_rows(ctx) == [2, 2, 2]


def test_an_exported_adapter_has_the_client_s_ranks() -> None:
    method = hetlora()
    ctx = replace(context(method), stage="personalise")
    made = method.personaliser(ctx)
    assert made.metrics["rank"].tolist() == [4, 3, 2]
    assert made.export is not None
    tensors = load(made.export(1, "base")["adapter_model.safetensors"])
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {3}


SPECS = [
    ParamSpec("lora_A.p", (2, 3), Scope.SHARED), ParamSpec("lora_B.p", (4, 2), Scope.SHARED),
    ParamSpec("lora_A.q", (2, 2), Scope.SHARED), ParamSpec("lora_B.q", (2, 2), Scope.SHARED),
    ParamSpec("head.weight", (5,), Scope.SHARED),
]  # fmt: skip


def client_row(seed: int) -> tuple[np.ndarray, list[float]]:
    """A row, and |B A|_F of its two modules by full matrices."""
    rng = np.random.default_rng(seed)
    parts = [rng.normal(size=spec.shape) for spec in SPECS]
    norms = [float(np.linalg.norm(parts[i + 1] @ parts[i])) for i in (0, 2)]
    return np.concatenate([p.ravel() for p in parts]).astype(np.float32), norms


@pytest.mark.parametrize("per_module", [False, True])
def test_clients_weigh_what_they_learned_and_heads_by_examples(per_module: bool) -> None:
    mean = FrobeniusMean(per_module).laid_out(SPECS)
    rows, norms = zip(*(client_row(seed) for seed in (1, 2, 3)), strict=True)
    examples = [2.0, 5.0, 3.0]
    whole = [mean.zero(len(rows[0])) for _ in range(2)]
    for row, n in zip(rows, examples, strict=True):
        whole[0] = mean.add(whole[0], row, n)
    parts = [mean.add(mean.zero(len(rows[0])), row, n) for row, n in zip(rows, examples, strict=True)]
    whole[1] = mean.merge(mean.merge(parts[0], parts[1]), parts[2])
    weights = np.array(norms) if per_module else np.linalg.norm(norms, axis=1, keepdims=True).repeat(2, 1)
    places = ((slice(0, 14), weights[:, 0]), (slice(14, 22), weights[:, 1]), (slice(22, 27), examples))
    expected = [np.average(np.array(rows)[:, at], axis=0, weights=w) for at, w in places]
    for state in whole:
        np.testing.assert_allclose(mean.result(state), np.concatenate(expected), rtol=1e-5)
        assert mean.weight(state) == 3


def test_where_nobody_has_learned_anything_clients_count_once() -> None:
    mean = FrobeniusMean().laid_out(SPECS)
    rows = [np.where(np.arange(27) < 6, value, 0).astype(np.float32) for value in (1.0, 4.0)]
    state = mean.add(mean.add(mean.zero(27), rows[0], 1.0), rows[1], 9.0)
    assert mean.result(state)[:6].tolist() == [2.5] * 6
    with pytest.raises(ZeroDivisionError):
        mean.result(mean.zero(27))


def test_what_a_low_rank_lacks_takes_part_as_zero() -> None:
    mean = FrobeniusMean().laid_out(SPECS[:2])
    high = np.array([1, 0, 0, 0, 1, 0, *np.eye(4, 2).ravel()], np.float32)
    low = high.copy()
    low[[4, 9]] = 0
    state = mean.add(mean.add(mean.zero(14), high, 1.0), low, 1.0)
    assert mean.result(state)[4] == pytest.approx(np.sqrt(2) / (np.sqrt(2) + 1))


def test_ranks_follow_their_rule() -> None:
    eight = [f"seen/x/{k:02d}" for k in range(8)]
    assert [Ranks().of(c, eight, 1, 4) for c in eight] == [8, 8, 9, 9, 10, 10, 11, 11]
    assert [Ranks(r_min=1).of(c, eight[:2], 1, 4) for c in eight[:2]] == [1, 6]
    drawn = Ranks(name="drawn", r_min=2, r_max=5)
    found = [[drawn.of(c, eight, seed, 4) for c in eight] for seed in range(6)]
    assert found[0] != found[1]
    assert {rank for one in found for rank in one} == {2, 3, 4, 5}
    assert found[1][2] == drawn.of(eight[2], eight[:3], 1, 4), "a client's draw is its own"
    assert Ranks(name="list", values=(7, 2)).of(eight[1], eight[:2], 1, 4) == 2
    assert {Ranks(name="budget").of(c, eight, 1, 4) for c in eight} == {4}
    assert Ranks().of("unseen/x/00", eight, 1, 4) == 12


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("hetlora.ranks={r_min: 9, r_max: 8}", r"'hetlora\.ranks': r_min = 9 is above r_max = 8 \(allowed: 1 \.\.\."),
        ("hetlora.ranks=list", r"'hetlora\.ranks': ranks=list needs 'values'"),
        ("hetlora.ranks={name: list, values: [2, 3]}", r"'hetlora\.ranks': 2 values for 4 seen clients \(allowed: 4"),
        ("hetlora.rank=4", r"'hetlora\.rank'"),
        ("aggregation=median", r"'methods': hetlora has clients of different ranks.* 'aggregation' = median cannot"),
        ("privacy.secure_aggregation=secagg", r"hetlora has clients of different.*secure_aggregation' = secagg"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(tmp_path, *RUN, "methods=[hetlora]", word)


def test_a_plan_shows_the_ranks_and_counts_the_average_client(tmp_path: Path) -> None:
    words = ("methods=[homlora,hetlora]", "homlora.rank=2", "hetlora.ranks={name: list, values: [1, 2, 3, 2]}")
    plan = make_plan(tiny(tmp_path, *RUN, *words))
    assert plan.sizes["hetlora"].shared == plan.sizes["homlora"].shared
    [note] = [note for note in plan.notes if note.startswith("HETLoRA")]
    assert "begin with the ranks 1, 2, 3, 2 (hetlora.ranks=list), 2 on average" in note


def test_by_budget_there_is_a_training_for_each(tmp_path: Path) -> None:
    words = ("methods=[hetlora]", "hetlora.ranks=budget", "hetlora.local_steps=1", "strategy.rounds=1", "budgets=[1,2]")
    run = run_tiny(tiny(tmp_path, *RUN, *words))
    down = run.timings().groupby("stage").bytes_down.unique().to_dict()
    assert {stage: len(sizes) for stage, sizes in down.items()} == dict.fromkeys(down, 1)
    assert [stage["key"] for stage in run.stages("strategy")] == [f"strategy/hetlora/r{r}/seed42" for r in (1, 2)]
    frame = run.metrics("personalise")
    ranks = frame[frame.metric == "rank"]
    assert (ranks.value == ranks.budget).all()
