"""Second derivatives in lanes against central finite differences of what they are derivatives of."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy import toy_context, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.core.errors import MethodError
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import whole_losses
from fedtailor.methods import build_method
from fedtailor.training import second_order
from fedtailor.training.second_order import difference, product, twice_differentiable

HOW = {"rank": 3, "private_rank": 2, "batch_size": 4}
ALPHA = 0.3


def context(
    kind: str = "texts", sizes: tuple[int, ...] = (9, 6), **more: Any
) -> tuple[ClientContext, list[str], list[str]]:
    """Two clients at random x and y: a step below zero would leave most derivatives out."""
    method = build_method("pf2lora", HOW, 4)
    net = toy_net() if kind == "texts" else toy_llama()
    lanes = toy_lanes(sizes) if kind == "texts" else with_prompts(toy_lanes(sizes))
    ctx = toy_context(net, lanes, method.adapter, method.modules, **more)
    draw = torch.Generator().manual_seed(11)
    pair = method.adapter
    for spec in pair.specs(net):
        ctx.params.set(spec.name, torch.randn(len(lanes), *spec.shape, generator=draw, dtype=torch.float64) * 0.2)
    pair.switch(net, ctx.params, "joint")
    return ctx, list(pair.first.names(net)), list(pair.second.names(net))


def batches(ctx: ClientContext) -> list[LaneBatch]:
    return list(ctx.batches([lane[:2] for lane in ctx.training_order(1, 4, "train")]))


def losses(ctx: ClientContext, batch: LaneBatch) -> Tensor:
    return whole_losses(ctx.net, batch)


def outer(ctx: ClientContext, y: list[str], inner: LaneBatch, after: LaneBatch) -> Tensor:
    """F(x, y - alpha grad_y F(x, y; inner); after) of each lane, in the definition's words."""
    slope = torch.autograd.grad(losses(ctx, inner).sum(), [ctx.params[name] for name in y])
    old = [ctx.params[name].detach().clone() for name in y]
    for name, start, s in zip(y, old, slope, strict=True):
        ctx.params.set(name, start - ALPHA * s)
    found = losses(ctx, after).detach()
    for name, start in zip(y, old, strict=True):
        ctx.params.set(name, start)
    return found


def hypergradient(
    ctx: ClientContext,
    x: list[str],
    y: list[str],
    inner: LaneBatch,
    after: LaneBatch,
    term: Callable[..., list[Tensor]],
) -> list[Tensor]:
    """The gradient g minus alpha times the term, as in PF2LoRA with pi = zeta."""
    old = [ctx.params[name].detach().clone() for name in y]
    slope = torch.autograd.grad(losses(ctx, inner).sum(), [ctx.params[name] for name in y])
    for name, start, s in zip(y, old, slope, strict=True):
        ctx.params.set(name, start - ALPHA * s)
    both = torch.autograd.grad(losses(ctx, after).sum(), [ctx.params[name] for name in (*x, *y)])
    for name, start in zip(y, old, strict=True):
        ctx.params.set(name, start)
    return [g - ALPHA * t for g, t in zip(both[: len(x)], term(both[len(x) :]), strict=True)]


@pytest.mark.parametrize("kind", ["texts", "talk"])
def test_the_hypergradient_is_the_slope_of_the_outer_loss(kind: str) -> None:
    ctx, x, y = context(kind)
    inner, after = batches(ctx)

    def exact(v: list[Tensor]) -> list[Tensor]:
        return product(ctx, inner, [ctx.params[n] for n in y], [ctx.params[n] for n in x], v)

    h = hypergradient(ctx, x, y, inner, after, exact)
    dropped = hypergradient(ctx, x, y, inner, after, lambda v: [torch.zeros_like(ctx.params[n]) for n in x])
    draw = torch.Generator().manual_seed(3)
    # A direction in each matrix, another in each lane: in lanes, in every layer, none masked by a larger one.
    for number in (0, 1, len(x) // 2, len(x) - 1):
        name, eps = x[number], 1e-4
        d = torch.randn(ctx.params[name].shape, generator=draw, dtype=torch.float64)
        start, values = ctx.params[name].detach().clone(), {}
        for times in (-2, -1, 1, 2):
            ctx.params.set(name, start + times * eps * d)
            values[times] = outer(ctx, y, inner, after)
        ctx.params.set(name, start)
        slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * eps)
        found, without = ((part[number] * d).flatten(1).sum(1) for part in (h, dropped))
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-9)
        assert ((without - slope).abs() > 1e-4 * slope.abs()).all(), "the term says nothing here"


@pytest.mark.parametrize("kind", ["texts", "talk"])
def test_a_difference_of_gradients_is_the_product(kind: str) -> None:
    ctx, x, y = context(kind)
    batch = batches(ctx)[0]
    v = list(torch.autograd.grad(losses(ctx, batch).sum(), [ctx.params[n] for n in y]))
    exact = product(ctx, batch, [ctx.params[n] for n in y], [ctx.params[n] for n in x], v)
    before = [ctx.params[n].detach().clone() for n in y]
    close = difference(ctx, batch, y, x, v, 3e-3)
    assert all(torch.equal(ctx.params[n], value) for n, value in zip(y, before, strict=True))
    for lane in range(2):
        one, two = (torch.cat([part[lane].flatten() for part in parts]) for parts in (exact, close))
        assert (one - two).norm() < 1e-3 * one.norm()
    assert all(not part.any() for part in difference(ctx, batch, y, x, [torch.zeros_like(t) for t in v], 3e-3))


def test_a_step_in_parts_has_the_same_second_derivatives() -> None:
    found = []
    for micro_batch in (None, 1):
        ctx, x, y = context(micro_batch=micro_batch)
        batch = batches(ctx)[0]
        v = [torch.ones_like(ctx.params[n]) for n in y]
        found.append(product(ctx, batch, [ctx.params[n] for n in y], [ctx.params[n] for n in x], v))
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_a_lane_that_no_longer_runs_has_none() -> None:
    ctx, x, y = context(sizes=(9, 3))
    last = list(ctx.batches(ctx.training_order(1, 4, "train")))[-1]
    assert last.lanes == 1
    v = [torch.ones_like(ctx.params[n]) for n in y]
    found = product(ctx, last, [ctx.params[n] for n in y], [ctx.params[n] for n in x], v)
    assert all(part[0].any() and not part[1].any() for part in found)


def test_attention_without_a_second_derivative_is_refused_in_words() -> None:
    net: Any = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    words = "attention by 'flash_attention_2' has no second derivative; use model.attention=sdpa or eager"
    with pytest.raises(MethodError, match=re.escape(words)), twice_differentiable(net):
        pass


def test_only_the_double_pass_asks_for_another_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen = [], []
    real = second_order.sdpa_kernel

    def noted(kernel: Any) -> Any:
        inside.append(kernel)
        return real(kernel)

    monkeypatch.setattr(second_order, "sdpa_kernel", noted)
    for order in ("second", "finite_difference", "first", "joint"):
        method = build_method("pf2lora", HOW | {"order": order, "local_steps": 2}, 4)
        method.local_update(toy_context(toy_net(), toy_lanes([9]), method.adapter, method.modules))
        seen.append(len(inside))
    assert seen == [2, 2, 2, 2]
