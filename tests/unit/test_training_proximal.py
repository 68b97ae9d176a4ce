"""The proximal term: the gradient of mu/2 |w - a|^2, once per step, for the lanes that run."""

from __future__ import annotations

import torch
from toy import toy_context, toy_lanes, toy_net

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.training.local import Training, train
from fedtailor.training.proximal import ProximalTerm

HOW, MU = Training(2, 4, max_grad_norm=0.5), 0.7
Trained = tuple[torch.Tensor, torch.Tensor]


def context(**more: object) -> tuple[ClientContext, dict[str, torch.Tensor]]:
    """Three ragged clients away from zero, and an anchor of their own for each."""
    ctx = toy_context(toy_net(), toy_lanes([9, 8, 3]), LoraAdapter(2, 2.0, Scope.SHARED), **more)
    draw = torch.Generator().manual_seed(5)
    for spec in ctx.params.specs:
        ctx.params.set(spec.name, torch.randn(3, *spec.shape, generator=draw, dtype=torch.float64) * 0.1)
    anchor = {s.name: torch.randn(3, *s.shape, generator=draw, dtype=torch.float64) for s in ctx.params.specs}
    return ctx, anchor


def by_term(mu: float | None, **more: object) -> Trained:
    ctx, anchor = context(**more)
    pull = None if mu is None else ProximalTerm(ctx.params, anchor, mu)
    trace = train(ctx, [AdamGroup(tuple(anchor), 5e-3)], HOW, after_backward=pull)
    return ctx.params.flat(Scope.SHARED).clone(), trace.loss


def by_loss() -> Trained:
    """The definition, in the loss."""
    ctx, anchor = context()

    def loss(batch: LaneBatch) -> torch.Tensor:
        k = batch.lanes
        moved = sum((ctx.params[n][:k] - a[:k]).square().flatten(1).sum(1) for n, a in anchor.items())
        return lane_cross_entropy(ctx.net.logits(batch), batch) + MU / 2 * moved

    trace = train(ctx, [AdamGroup(tuple(anchor), 5e-3)], HOW, loss)
    return ctx.params.flat(Scope.SHARED).clone(), trace.loss


def test_it_is_the_gradient_of_its_definition_clipped_with_the_rest() -> None:
    (found, loss), (wanted, with_term) = by_term(MU), by_loss()
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert (loss < with_term).all(), "the loss reported is the task's own"


def test_a_step_cut_into_parts_has_the_term_once() -> None:
    torch.testing.assert_close(by_term(MU, micro_batch=2)[0], by_term(MU)[0], rtol=1e-9, atol=1e-12)


def test_at_zero_it_changes_no_bit() -> None:
    assert torch.equal(by_term(0.0)[0], by_term(None)[0])


def test_a_larger_weight_ends_nearer_to_the_anchor() -> None:
    distances = []
    for mu in (0.0, 1e-2, 1.0):
        ctx, anchor = context()
        term = ProximalTerm(ctx.params, anchor, mu)
        train(ctx, [AdamGroup(tuple(anchor), 5e-3)], HOW, after_backward=term)
        distances.append(term.distance())
        for k in range(3):
            alone = torch.cat([(ctx.params[n][k] - a[k]).detach().flatten() for n, a in anchor.items()])
            torch.testing.assert_close(distances[-1][k], alone.norm())
    assert (distances[0] > distances[1]).all()
    assert (distances[1] > distances[2]).all()


def test_a_lane_that_has_ended_is_left_alone() -> None:
    ctx, anchor = context()
    ctx.params.zero_gradients()
    batch = next(iter(ctx.batches([indices[:1] for indices in ctx.training_order(1, 4, "train")[:2]])))
    ProximalTerm(ctx.params, anchor, MU)(batch, 0)
    for name, a in anchor.items():
        w = ctx.params[name]
        torch.testing.assert_close(w.grad[:2], MU * (w - a)[:2].detach())
        assert not w.grad[2:].any()
