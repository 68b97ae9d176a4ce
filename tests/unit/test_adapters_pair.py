"""Two adapters that can be switched, and which layers ``body`` and ``head`` are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from toy import toy_context, toy_lanes, toy_llama, toy_net

from fedtailor.adapters.lora import AdapterPair, LoraAdapter, Targets
from fedtailor.adapters.selected_lora import RankSelection, SelectedLora
from fedtailor.core.errors import ModelError
from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import Adapter
from fedtailor.models.families import adapted_linears


def lora(name: str, rank: int, scope: Scope, targets: Targets = "all-linear", head: bool = False) -> LoraAdapter:
    return LoraAdapter(rank, 2.0, scope, prefix=name, targets=targets, head=head)


def random_values(ctx: ClientContext) -> None:
    draw = torch.Generator().manual_seed(5)
    for spec in ctx.params.specs:
        ctx.params.set(spec.name, torch.randn(len(ctx.lanes), *spec.shape, generator=draw, dtype=torch.float64) * 0.2)


def batch_of(ctx: ClientContext) -> Any:
    return make_batch([lane.train for lane in ctx.lanes], [torch.arange(3).numpy()] * len(ctx.lanes), 0)


def merged_logits(ctx: ClientContext, adapters: list[LoraAdapter], lane: int) -> torch.Tensor:
    """The same model with the adapters' values written into its weights."""
    plain = toy_net()
    model = copy.deepcopy(plain.model)
    for adapted, layer in zip(plain.adapted, plain.layers, strict=True):
        model.set_submodule(adapted.name, copy.deepcopy(layer.base))
    for adapter in adapters:
        tensors = {name: ctx.params[name][lane].detach().numpy() for name in adapter.names(plain)}
        with torch.no_grad():
            adapter.merge(model, tensors)
    return LaneNet(model, adapted_linears(model)).logits(batch_of(ctx))[lane]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lora("global", 3, Scope.SHARED), lora("local", 2, Scope.PRIVATE)),
        (lora("global", 3, Scope.SHARED, head=True), lora("local", 2, Scope.PRIVATE, ("query", "value"))),
        (lora("global", 3, Scope.SHARED, "body"), lora("local", 2, Scope.EPHEMERAL, "head")),
    ],
    ids=["same layers", "other layers and a head", "body and head"],
)
def test_each_position_is_its_adapters_merged_and_trains_the_last(first: LoraAdapter, second: LoraAdapter) -> None:
    pair = AdapterPair(first, second)
    ctx = toy_context(toy_net(), toy_lanes([9, 5]), pair)
    random_values(ctx)
    positions = {"first": [first], "second": [second], "both": [first, second], "again": [first]}
    for to, adapters in positions.items():
        pair.switch(ctx.net, ctx.params, "first" if to == "again" else to)
        ctx.params.zero_gradients()
        batch = batch_of(ctx)
        found = ctx.net.logits(batch)
        lane_cross_entropy(found, batch).sum().backward()
        for lane in range(2):
            torch.testing.assert_close(found[lane], merged_logits(ctx, adapters, lane), rtol=1e-9, atol=1e-10)
        moved = {name for name in (*first.names(ctx.net), *second.names(ctx.net)) if ctx.params[name].grad.any()}
        assert moved == set(adapters[-1].names(ctx.net)), to


def test_as_bound_it_is_the_sum() -> None:
    pair = AdapterPair(lora("global", 3, Scope.SHARED), lora("local", 2, Scope.PRIVATE))
    ctx = toy_context(toy_net(), toy_lanes([9, 5]), pair)
    random_values(ctx)
    bound = ctx.net.logits(batch_of(ctx))
    pair.switch(ctx.net, ctx.params, "both")
    assert torch.equal(bound, ctx.net.logits(batch_of(ctx)))


@pytest.mark.parametrize("make", [toy_net, toy_llama])
def test_a_new_pair_starts_as_the_base_with_equal_a(make: Any) -> None:
    net, pair = make(), AdapterPair(lora("global", 3, Scope.SHARED), lora("local", 2, Scope.PRIVATE))
    values = pair.initial(net, 3)
    assert all(torch.equal(values[f"global_A.{m}"][:2], values[f"local_A.{m}"]) for m in net.modules)
    assert not any("_B." in name for name in values)


def test_body_and_head_are_all_layers_between_them() -> None:
    net = toy_net()
    layers = {
        t: [spec.name for spec in lora("x", 2, Scope.SHARED, t).specs(net)] for t in ("all-linear", "body", "head")
    }
    assert layers["body"] + layers["head"] == layers["all-linear"]
    assert layers["head"] == ["x_A.classifier", "x_B.classifier"]


def test_a_language_model_is_body_only() -> None:
    net = toy_llama()
    adapters: list[Adapter] = [lora("x", 2, Scope.SHARED, "body"), lora("x", 2, Scope.SHARED)]
    assert adapters[0].specs(net) == adapters[1].specs(net)
    with pytest.raises(ModelError, match="no adapted layer belongs to the head; this model has down_proj"):
        lora("x", 2, Scope.SHARED, "head").specs(net)


def test_a_head_that_holds_no_numbers_is_not_exported() -> None:
    adapter = lora("x", 2, Scope.SHARED, ("query",), head=True)
    ctx = toy_context(toy_net(), toy_lanes([9]), adapter)
    with torch.no_grad():
        ctx.params["classifier.bias"][0, 1] = float("inf")
    with pytest.raises(ModelError, match=r"client a, classifier\.bias: the weight holds values that are not finite"):
        adapter.export(ctx.net, ctx.params, ["a"], 0, "base")


def test_only_layers_that_may_carry_an_adapter_draw_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers that no lane adapts some draw all the same, where other lanes might adapt them."""
    lanes = toy_lanes([3, 3])
    keep = torch.zeros(2, len(toy_net().adapted), 4, dtype=torch.bool)
    keep[:, 0, :2] = True
    adapters: dict[str, tuple[Adapter, int]] = {
        "two layers": (lora("lora", 2, Scope.SHARED, ("query", "value")), 2 * 2),
        "ranks in one": (SelectedLora(RankSelection(keep.double(), keep), 1.0), len(toy_net().adapted)),
        "a frozen one below": (
            AdapterPair(lora("a", 2, Scope.SHARED), lora("b", 2, Scope.PRIVATE, ("query",))),
            2,
        ),
    }
    for name, (adapter, drawing) in adapters.items():
        net, calls = toy_net(), 0
        ctx = toy_context(net, lanes, adapter)
        ctx.use_dropout(0.5, "train")
        rand = torch.rand

        def counted(*args: Any, rand: Any = rand, **how: Any) -> torch.Tensor:
            nonlocal calls
            calls += "generator" in how
            return rand(*args, **how)

        net.train_mode(True)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "rand", counted)
            net.logits(batch_of(ctx))
        assert calls == drawing * len(lanes), name
