"""Base methods with a part of their own per client: FedDPA-T's local LoRA, DEPT's embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toy import toy_context, toy_lanes, toy_net

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.federated.method import Method
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.methods import build_method
from fedtailor.models.families import adapted_linears

TRAINING = {"lr": 5e-3, "batch_size": 4, "epochs": 2}
LORA = {"targets": ["query", "value"], "rank": 3, "scale": 1.0, "dropout": 0.05}


def update(method: Method, net: LaneNet, sizes: list[int]) -> tuple[LaneParams, dict[str, torch.Tensor]]:
    ctx = toy_context(net, toy_lanes(sizes), method.adapter, method.modules)
    assert method.local_update is not None
    report = method.local_update(ctx)
    return ctx.params, dict(report.metrics)


def test_feddpa_without_a_local_lora_is_fedavg_on_lora() -> None:
    dual = build_method("feddpa", TRAINING | LORA | {"local_rank": 0}, 4)
    plain = build_method("fedavg", TRAINING | LORA | {"adapter": "lora", "head": True}, 4)
    found, metrics = update(dual, toy_net(), [9, 5])
    wanted, expected = update(plain, toy_net(), [9, 5])
    assert torch.equal(found.flat(Scope.SHARED), wanted.flat(Scope.SHARED))
    assert torch.equal(metrics["train_loss"], expected["train_loss"])
    assert dual.overlay is None


def test_the_local_lora_does_not_touch_what_is_sent() -> None:
    alone, _ = update(build_method("feddpa", TRAINING | LORA | {"local_rank": 0}, 4), toy_net(), [9, 5])
    both, metrics = update(build_method("feddpa", TRAINING | LORA | {"local_rank": 2}, 4), toy_net(), [9, 5])
    assert torch.equal(both.flat(Scope.SHARED), alone.flat(Scope.SHARED))
    assert both["local_B.bert.encoder.layer.0.attention.self.query"].abs().min() > 0
    assert (metrics["local_train_loss"] < metrics["train_loss"]).all(), "phase 2 goes on where phase 1 ended"


def test_dept_without_private_embeddings_is_fedavg() -> None:
    dept = build_method("dept", TRAINING | {"private": []}, 4)
    found, _ = update(dept, toy_net(dropout=0.0), [9])
    wanted, _ = update(build_method("fedavg", TRAINING, 4), toy_net(dropout=0.0), [9])
    assert torch.equal(found.flat(Scope.SHARED), wanted.flat(Scope.SHARED))
    assert dept.overlay is None


def test_depts_private_part_is_the_three_tables_and_only_they() -> None:
    net = toy_net()
    specs = build_method("dept", {}, 4).adapter.specs(net)
    private = [spec.name for spec in specs if spec.scope is Scope.PRIVATE]
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    assert private == [f"bert.embeddings.{table}.weight" for table in tables]
    assert any("LayerNorm" in spec.name and spec.scope is Scope.SHARED for spec in specs)


def trained_overlay(name: str, config: dict) -> tuple[Method, LaneParams]:
    """Two clients after a local update: their PRIVATE rows as an overlay's parameters."""
    method = build_method(name, TRAINING | config, 4)
    assert method.overlay is not None
    rows = []
    for lane in toy_lanes([9, 5]):
        ctx = toy_context(toy_net(dropout=0.0), [lane], method.adapter)
        method.local_update(ctx)
        rows.append(ctx.params.flat(Scope.PRIVATE)[0].detach().clone())
    net = toy_net(dropout=0.0)
    params = LaneParams(method.overlay.specs(net), 2, "cpu", net.param_dtype, trained=False)
    for number, row in enumerate(rows):
        params.flat(Scope.PRIVATE)[number].copy_(row)
    return method, params


@pytest.mark.parametrize(("name", "config"), [("feddpa", LORA | {"local_rank": 2}), ("dept", {})])
def test_an_overlay_is_the_base_with_the_clients_row_merged(name: str, config: dict) -> None:
    method, params = trained_overlay(name, config)
    net, lanes = toy_net(dropout=0.0), toy_lanes([9, 5])
    method.overlay.bind(net, params)
    net.overlay_index = {lane.client.id: number for number, lane in enumerate(lanes)}
    # Four lanes as a personaliser has them, two of each client.
    repeated = [lanes[0], lanes[0], lanes[1], lanes[1]]
    net.place([lane.client.id for lane in repeated])
    batch = make_batch([lane.train for lane in repeated], [torch.arange(3).numpy()] * 4, 0)
    found = net.logits(batch)
    for number in range(2):
        plain = toy_net(dropout=0.0)
        model = copy.deepcopy(plain.model)
        for layer_name, linear in [(s.name, lay.base) for s, lay in zip(plain.adapted, plain.layers, strict=True)]:
            parent = model.get_submodule(layer_name.rpartition(".")[0])
            setattr(parent, layer_name.rpartition(".")[2], copy.deepcopy(linear))
        tensors = {spec.name: params[spec.name][number].float().numpy() for spec in params.specs}
        with torch.no_grad():
            method.overlay.merge(model, tensors)
        merged = LaneNet(model, adapted_linears(model))
        wanted = merged.logits(make_batch([lanes[number].train], [torch.arange(3).numpy()], 0))
        # A lane's batch is as wide as the group's; the merged one is rounded to float32.
        torch.testing.assert_close(found[2 * number], wanted[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[2 * number + 1], wanted[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "config"), [("feddpa", LORA | {"local_rank": 2}), ("dept", {})])
def test_the_initial_overlay_changes_nothing(name: str, config: dict) -> None:
    method, net, lane = build_method(name, config, 4), toy_net(), toy_lanes([6])[0]
    batch = make_batch([lane.train], [torch.arange(6).numpy()], 0)
    before = net.logits(batch)
    params = LaneParams(method.overlay.specs(net), 1, "cpu", net.param_dtype, trained=False)
    for spec, value in method.overlay.initial(net, 3).items():
        params.set(spec, value)
    method.overlay.bind(net, params)
    net.overlay_index = {lane.client.id: 0}
    net.place([lane.client.id])
    torch.testing.assert_close(net.logits(batch), before, rtol=1e-12, atol=1e-12)
    net.clear_overlay()
    assert torch.equal(net.logits(batch), before)


def test_the_heads_lora_is_merged_on_top_of_the_heads_own_weights() -> None:
    net, adapter = toy_net(), LoraAdapter(2, 2.0, Scope.SHARED, targets=("classifier",), head=True)
    draw = torch.Generator().manual_seed(5)
    values = {spec.name: torch.randn(spec.shape, generator=draw, dtype=torch.float64) for spec in adapter.specs(net)}
    model = nn.ModuleDict({"classifier": nn.Linear(16, 4)}).double()
    with torch.no_grad():
        adapter.merge(model, {name: value.numpy() for name, value in values.items()})
    low_rank = 2.0 * values["lora_B.classifier"] @ values["lora_A.classifier"]
    torch.testing.assert_close(model["classifier"].weight.data, values["classifier.weight"] + low_rank)
    torch.testing.assert_close(model["classifier"].bias.data, values["classifier.bias"])


def test_a_head_without_a_bias_is_trained_too() -> None:
    """As decoders that classify have."""
    net, adapter = toy_net(), LoraAdapter(2, 2.0, Scope.SHARED, targets=("query",), head=True)
    net.layers[-1].base.bias = None
    assert [s.name for s in adapter.specs(net) if "lora" not in s.name] == ["classifier.weight"]
    params = LaneParams(adapter.specs(net), 2, "cpu", net.param_dtype)
    for name, value in adapter.initial(net, 3).items():
        params.set(name, value)
    batch = make_batch([lane.train for lane in toy_lanes([4, 4])], [torch.arange(4).numpy()] * 2, 0)
    before = net.logits(batch)
    adapter.bind(net, params)
    torch.testing.assert_close(net.logits(batch), before, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        params["classifier.weight"][1] *= 2
    torch.testing.assert_close(net.logits(batch)[1], 2 * before[1])
