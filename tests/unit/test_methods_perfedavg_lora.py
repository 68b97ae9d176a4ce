"""Per-FedAvg on LoRA: its meta-gradient, its approximations, and HOMLoRA where it looks no step ahead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from toy import toy_context, toy_lanes, toy_net

from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability
from fedtailor.lanes.loss import whole_losses
from fedtailor.methods import build_method

COMMON = {"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3}
HOW = {
    "lr": 1.0,
    "batch_size": 4,
    "local_steps": 1,
    "rank": 3,
    "inner_lr": 0.3,
    "optimizer": "sgd",
    "weight_decay": 0.0,
}
ORDERS = ("second", "hessian_free", "first")


def context(name: str, how: dict[str, Any], spread: bool = True, **more: Any) -> ClientContext:
    method = build_method(name, how, 4)
    ctx = toy_context(toy_net(), toy_lanes([9, 6]), method.adapter, method.modules, **more)
    draw = torch.Generator().manual_seed(11)
    for spec in method.adapter.specs(ctx.net) if spread else ():
        old = ctx.params[spec.name].detach()
        ctx.params.set(spec.name, old + 0.1 * torch.randn(old.shape, generator=draw, dtype=old.dtype))
    return ctx


def stepped(how: dict[str, Any], **more: Any) -> torch.Tensor:
    """Where the one step of SGD at rate 1 leads: minus the meta-gradient, (K, P)."""
    ctx = context("perfedavg_lora", HOW | how, **more)
    before = trained(ctx)
    build_method("perfedavg_lora", HOW | how, 4).local_update(ctx)
    return before - trained(ctx)


def trained(ctx: ClientContext) -> torch.Tensor:
    return torch.cat([ctx.params[s.name].detach().flatten(1) for s in ctx.params.specs if "adam" not in s.name], 1)


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_step_ahead_it_is_homlora(order: str) -> None:
    rows = []
    for name, how in (("homlora", {}), ("perfedavg_lora", {"inner_lr": 0.0, "order": order})):
        ctx = context(name, COMMON | how)
        build_method(name, COMMON | how, 4).local_update(ctx)
        rows.append(trained(ctx))
    torch.testing.assert_close(rows[1], rows[0], rtol=1e-9, atol=1e-12)


def test_the_step_is_down_the_slope_of_the_loss_one_step_ahead() -> None:
    found = stepped({})
    ctx = context("perfedavg_lora", HOW)
    names = [s.name for s in ctx.params.specs]
    outer, inner = (next(ctx.batches(ctx.training_order(1, 4, purpose))) for purpose in ("train", "train/inner"))

    def ahead(name: str, move: torch.Tensor) -> torch.Tensor:
        start = {n: ctx.params[n].detach().clone() for n in names}
        ctx.params.set(name, start[name] + move)
        slope = torch.autograd.grad(whole_losses(ctx.net, inner).sum(), [ctx.params[n] for n in names])
        for n, s in zip(names, slope, strict=True):
            ctx.params.set(n, ctx.params[n].detach() - 0.3 * s)
        value = whole_losses(ctx.net, outer).detach()
        for n in names:
            ctx.params.set(n, start[n])
        return value

    sizes, draw, eps = [ctx.params[n][0].numel() for n in names], torch.Generator().manual_seed(3), 1e-4
    parts = dict(zip(names, found.split(sizes, 1), strict=True))
    for name in (names[0], names[1], names[-3], "classifier.weight"):
        d = torch.randn(ctx.params[name].shape, generator=draw, dtype=torch.float64)
        one, two = (ahead(name, k * eps * d) - ahead(name, -k * eps * d) for k in (1, 2))
        slope = (8 * one - two) / (12 * eps)
        torch.testing.assert_close((parts[name] * d.flatten(1)).sum(1), slope, rtol=1e-6, atol=1e-9)


def test_the_hessian_free_step_is_the_second_order_one_and_the_first_order_one_is_not() -> None:
    exact, close, first = (stepped({"order": order}) for order in ORDERS)
    assert ((close - exact).norm(dim=1) < 3e-3 * (first - exact).norm(dim=1)).all()
    assert ((first - exact).norm(dim=1) > 1e-2 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("batches", [2, 3])
def test_the_batch_of_the_hessian_is_a_switch_and_may_come_in_parts(batches: int) -> None:
    whole = stepped({"batches": batches})
    torch.testing.assert_close(stepped({"batches": batches}, micro_batch=1), whole, rtol=1e-7, atol=1e-10)
    assert not torch.allclose(whole, stepped({"batches": 5 - batches}), rtol=1e-6)


def test_the_model_is_one_inner_step_away_for_everyone() -> None:
    method = build_method("perfedavg_lora", HOW, 4)
    ctx = replace(context("perfedavg_lora", HOW), stage="personalise", fresh=torch.tensor([False, True]))
    before = trained(ctx)
    batch = next(ctx.batches(ctx.training_order(1, 4, "personalise")))
    slope = torch.autograd.grad(whole_losses(ctx.net, batch).sum(), [ctx.params[s.name] for s in ctx.params.specs])
    method.personaliser(ctx)
    expected = before - 0.3 * torch.cat([s.flatten(1) for s in slope], 1)
    torch.testing.assert_close(trained(ctx), expected, rtol=1e-9, atol=1e-12)


def test_only_the_exact_form_needs_second_derivatives() -> None:
    needs = [build_method("perfedavg_lora", {"order": order}, 4).requires for order in ORDERS]
    assert needs == [{Capability.SECOND_ORDER}, set(), set()]
