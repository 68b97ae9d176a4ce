"""HOMLoRA: an AdamW that lives as long as its client, on a LoRA that is averaged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_context, toy_lanes, toy_net

from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method
from fedtailor.lanes.loss import lane_losses
from fedtailor.methods import build_method

HOW = {"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3, "targets": ("query", "value")}


def rounds(method: Method, sizes: list[int], count: int) -> ClientContext:
    """Rounds of clients who each go on by themselves: nothing is averaged."""
    ctx = toy_context(toy_net(), toy_lanes(sizes), method.adapter, method.modules)
    for number in range(count):
        before = {scope: ctx.params.flat(scope).clone() for scope in (Scope.SHARED, Scope.PRIVATE)}
        again = toy_context(ctx.net, ctx.lanes, method.adapter, method.modules)
        for scope, value in before.items():
            again.params.flat(scope).copy_(value)
        ctx = replace(again, round=number)
        method.local_update(ctx)
    return ctx


def trained(ctx: ClientContext, method: Method) -> torch.Tensor:
    return torch.cat([ctx.params[name].detach().flatten(1) for name in method.adapter.names(ctx.net)], 1)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "fresh"])
def test_one_client_is_centralised_training_of_its_lora(keep: bool) -> None:
    method = build_method("homlora", HOW | {"keep_optimizer": keep}, 4)
    done = rounds(method, [9], 3)
    ctx = toy_context(toy_net(), toy_lanes([9]), method.adapter, method.modules)
    weights = [ctx.params[name] for name in method.adapter.names(ctx.net)]

    def adamw() -> torch.optim.AdamW:
        return torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.01)

    optimizer = adamw()
    for number in range(3):
        optimizer = optimizer if keep else adamw()
        order = replace(ctx, round=number).training_order(1, 4, "train")
        for batch in ctx.batches([lane[:3] for lane in order]):
            ctx.params.zero_gradients()
            lane_losses(ctx.net, batch).sum().backward()
            optimizer.step()
    torch.testing.assert_close(trained(done, method), trained(ctx, method), rtol=1e-9, atol=1e-12)


def test_moments_are_kept_per_client_and_only_where_asked_for() -> None:
    kept, fresh = (build_method("homlora", HOW | {"keep_optimizer": keep}, 4) for keep in (True, False))
    assert not fresh.modules
    done = rounds(kept, [9, 8, 3], 2)
    assert done.params["adam.steps"].flatten().tolist() == [6.0] * 3
    assert bool((done.params["adam.second"] > 0).any(1).all())
    assert not torch.equal(trained(done, kept), trained(rounds(fresh, [9, 8, 3], 2), fresh))


@pytest.mark.parametrize(("mean", "expected"), [("plain", 2.0), ("examples", 2.5)])
def test_the_mean_is_plain_or_by_examples(mean: str, expected: float) -> None:
    aggregator: Any = build_method("homlora", {"mean": mean}, 4).aggregator
    state = aggregator.add(aggregator.zero(1), np.array([1.0], np.float32), 1.0)
    state = aggregator.add(state, np.array([3.0], np.float32), 3.0)
    assert aggregator.result(state).tolist() == [expected]


def test_sgd_needs_no_state() -> None:
    method = build_method("homlora", HOW | {"optimizer": "sgd", "lr": 0.1}, 4)
    assert not method.modules
    assert not torch.equal(trained(rounds(method, [9], 1), method), trained(rounds(method, [9], 2), method))


@pytest.mark.parametrize(("head", "scope"), [("shared", Scope.SHARED), ("client", Scope.PRIVATE), ("frozen", None)])
def test_whose_the_head_is(head: str, scope: Scope | None) -> None:
    method = build_method("homlora", HOW | {"head": head}, 4)
    found = {spec.name: spec.scope for spec in method.adapter.specs(toy_net())}
    assert {found.get("classifier.weight"), found.get("classifier.bias")} == {scope}
    assert {value for name, value in found.items() if name.startswith("lora")} == {Scope.SHARED}


def test_a_client_that_no_round_met_trains_its_own_head_and_nothing_else() -> None:
    method = build_method("homlora", HOW | {"head": "client"}, 4)
    ctx = toy_context(toy_net(), toy_lanes([9, 8, 3]), method.adapter, method.modules)
    ctx = replace(ctx, stage="personalise", fresh=torch.tensor([False, True, False]))
    before = {spec.name: ctx.params[spec.name].detach().clone() for spec in ctx.params.specs}
    method.personaliser(ctx)
    moved = {name: (ctx.params[name] != value).flatten(1).any(1).tolist() for name, value in before.items()}
    assert {name for name, lanes in moved.items() if any(lanes)} == {"classifier.weight", "classifier.bias"}
    assert moved["classifier.weight"] == [False, True, False]
