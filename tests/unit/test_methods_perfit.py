"""PerFIT: FedAvg without pruning; masks by importance, kept, and a mean over those who keep a parameter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny
from toy import play_rounds, toy_context, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.aggregation.owners import OwnedStep, OwnersMean
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_losses
from fedtailor.methods import build_method

HOW = {"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 2, "score_rows": 6, "dropout": 0.1}


def context(rounds_known: bool = False, **how: object) -> ClientContext:
    """Three clients of instructions, whose A and B are drawn; those known have a mask of two thirds of them."""
    method = build_method("perfit", HOW | how, 2)
    lanes = with_prompts(toy_lanes([9, 8, 3]))
    ctx = toy_context(toy_llama(), lanes, method.adapter, method.modules)
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        shared = ctx.params.flat(Scope.SHARED)
        shared.copy_(torch.randn(1, shared.shape[1], generator=draw, dtype=shared.dtype).expand_as(shared) * 0.1)
        if rounds_known:
            ctx.params["mask"].copy_((torch.rand(ctx.params["mask"].shape, generator=draw) < 2 / 3).double())
    return replace(ctx, fresh=torch.full((3,), not rounds_known))


def played(ctx: ClientContext, **how: object) -> list[int]:
    method = build_method("perfit", HOW | how, 2)
    assert method.downlink is not None
    with torch.no_grad():
        sent = list(method.downlink(ctx))
    assert method.local_update is not None
    method.local_update(ctx)
    return sent


def test_with_full_masks_it_is_fedavg() -> None:
    own, private = play_rounds(build_method("perfit", HOW | {"expand": 1}, 2), 3)
    plain = {key: value for key, value in HOW.items() if key != "score_rows"}
    fedavg = build_method("fedavg", plain | {"adapter": "lora", "targets": ["query", "value"]}, 2)
    for found, expected in zip(own, play_rounds(fedavg, 3)[0], strict=True):
        np.testing.assert_array_equal(found, expected)
    assert all((mask == 1).all() for mask in private.values())


def test_a_first_round_prunes_to_what_a_lora_of_rank_r_has() -> None:
    ctx = context()
    [whole] = set(played(ctx))
    mask = ctx.params["mask"]
    assert whole == mask.shape[1] == 2 * sum(s.size for s in build_method("fedavg", {
        "adapter": "lora", "rank": 2, "targets": ["query", "value"]}, 2).adapter.specs(ctx.net))  # type: ignore[union-attr]  # fmt: skip
    assert mask.count_nonzero(1).tolist() == [whole // 2] * 3
    shared = ctx.params.flat(Scope.SHARED)
    assert torch.equal(shared != 0, mask != 0)
    assert not torch.equal(mask[0], mask[1]), "each client has its own"


def test_a_known_client_trains_what_it_keeps_and_keeps_its_mask() -> None:
    ctx = context(rounds_known=True)
    before, start = ctx.params["mask"].detach().clone(), ctx.params.flat(Scope.SHARED).detach().clone()
    sent = played(ctx)
    assert sent == before.count_nonzero(1).tolist()
    assert torch.equal(ctx.params["mask"], before)
    shared = ctx.params.flat(Scope.SHARED)
    assert (shared[before == 0] == 0).all()
    assert (shared != start * before)[before == 1].float().mean() > 0.9, "what is kept is trained"


def test_masks_may_be_found_anew_in_every_round() -> None:
    ctx = context(rounds_known=True, search="every_round")
    before = ctx.params["mask"].detach().clone()
    [whole] = set(played(ctx, search="every_round"))
    assert whole == before.shape[1], "the search begins with everything"
    assert not torch.equal(ctx.params["mask"], before)
    assert set(ctx.params["mask"].count_nonzero(1).tolist()) == {whole // 2}


def test_kept_are_those_whose_removal_changes_the_loss_most_to_first_order() -> None:
    how = {"lr": 1e-12, "prune_steps": 1, "score_rows": 9}
    ctx = context(**how)
    batch = make_batch([x.train for x in ctx.lanes], [np.arange(len(x.train)) for x in ctx.lanes], 0)
    lane_losses(ctx.net, batch).sum().backward()
    [values] = ctx.params.slices([s.name for s in ctx.params.of_scope(Scope.SHARED)])
    scores = (values.value * values.grad).abs()
    played(ctx, **how)
    kept = ctx.params["mask"] == 1
    least, most = torch.where(kept, scores, torch.inf).amin(1), torch.where(kept, 0.0, scores).amax(1)
    assert (least > most).all()
    assert most.min() > 0


def test_scores_are_of_what_the_steps_before_have_left() -> None:
    masks = []
    for steps in (1, 5):
        ctx = context(prune_steps=steps)
        played(ctx, prune_steps=steps)
        masks.append(ctx.params["mask"].detach().clone())
    assert not torch.equal(*masks)
    assert (masks[0] == masks[1]).float().mean() > 0.7


def test_every_parameter_is_the_mean_of_those_who_keep_it() -> None:
    rows = np.array([[1, 0, 0, 4], [3, 2, 0, 0], [0, 6, 0, 0]], np.float32)
    mean = OwnersMean()
    halves = [mean.add(mean.add(mean.zero(4), rows[0], 3), rows[1], 1), mean.add(mean.zero(4), rows[2], 4)]
    np.testing.assert_allclose(mean.result(mean.merge(*halves)), [1.5, (2 + 24) / 5, 0, 4], rtol=1e-6)


def test_rows_without_pruning_are_averaged_as_by_fedavg_to_the_last_bit() -> None:
    rng = np.random.default_rng(3)
    own, plain = OwnersMean(), WeightedMean()
    states = own.zero(40), plain.zero(40)
    for weight in (3.0, 7.0, 1.0):
        row = rng.normal(size=40).astype(np.float32)
        states = own.add(states[0], row, weight), plain.add(states[1], row, weight)
    np.testing.assert_array_equal(own.result(states[0]), plain.result(states[1]))


def test_what_a_cohort_does_not_keep_stays_and_what_nobody_ever_kept_is_zero() -> None:
    server, w = OwnedStep(), np.array([0.1, 0.2, 0.3], np.float32)
    state = server.init(w)
    first, state = server.step(w, np.array([0.5, 0.7, 0], np.float32) - w, state)
    assert first.tolist() == pytest.approx([0.5, 0.7, 0.0])
    second, _ = server.step(first, np.array([0.9, 0, 0], np.float32) - first, state)
    assert second.tolist() == pytest.approx([0.9, 0.7, 0.0])


def test_the_mask_is_what_a_model_is_made_with_in_the_end() -> None:
    ctx = replace(context(rounds_known=True), stage="personalise", budgets=(2,))
    method, before = build_method("perfit", HOW, 2), ctx.params["mask"].detach().clone()
    start = ctx.params.flat(Scope.SHARED).detach().clone()
    with torch.no_grad():
        method.downlink(ctx)  # type: ignore[misc]
    method.personaliser(ctx)
    assert torch.equal(ctx.params.flat(Scope.SHARED), start * before)
    fresh = replace(context(), stage="personalise", budgets=(2,))
    start = fresh.params.flat(Scope.SHARED).detach().clone()
    with torch.no_grad():
        method.downlink(fresh)  # type: ignore[misc]
    assert torch.equal(fresh.params.flat(Scope.SHARED), start), "a client that no round met has no mask"


@pytest.mark.parametrize("asked", ["aggregation=median", "privacy.secure_aggregation=secagg"])
def test_what_needs_a_plain_mean_is_refused(tmp_path: Path, asked: str) -> None:
    with pytest.raises(ConfigError, match="'methods': perfit has clients that prune what they send"):
        tiny(tmp_path, "methods=[perfit]", asked)


def test_a_classifier_s_layers_are_pruned_likewise() -> None:
    served, private = play_rounds(build_method("perfit", HOW, 2), 2, net=toy_net())
    assert {int(mask.sum()) for mask in private.values()} == {served[0].size // 2}
