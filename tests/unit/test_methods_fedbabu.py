"""FedBABU: FedAvg on the body; the head stays what it was in the rounds, and is what clients tune in the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import toy_context, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import Scope
from fedtailor.experiment.compose import compose
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability
from fedtailor.methods import build_method

HOW = {"lr": 5e-3, "batch_size": 4, "epochs": 2, "tune_epochs": 2}


def after_a_round(**config: object) -> ClientContext:
    method = build_method("fedbabu", HOW | config, 3)
    ctx = toy_context(toy_net(), toy_lanes([9, 5]), method.adapter, budgets=(3,), r_max=3)
    method.local_update(ctx)
    return ctx


def test_a_round_is_fedavg_on_the_body() -> None:
    own = after_a_round()
    fedavg = build_method("fedavg", {"lr": 5e-3, "batch_size": 4, "rank": 3, "adapter": "lora", "targets": "body"}, 3)
    plain = toy_context(toy_net(), toy_lanes([9, 5]), fedavg.adapter)
    fedavg.local_update(plain)
    assert torch.equal(own.params.flat(Scope.SHARED), plain.params.flat(Scope.SHARED))


def test_the_head_is_neither_sent_nor_changed_in_a_round() -> None:
    ctx, untouched = after_a_round(), toy_net()
    assert not any("classifier" in spec.name for spec in ctx.params.specs)
    head, before = ctx.net.layers[-1], untouched.layers[-1]
    assert head.name == "classifier"
    assert head.a is None
    assert torch.equal(head.base.weight, before.base.weight)
    assert torch.equal(head.base.bias, before.base.bias)


@pytest.mark.parametrize(
    ("tune", "moves"), [(None, {"head"}), ("head", {"head"}), ("body", {"body"}), ("all-linear", {"head", "body"})]
)
def test_a_client_tunes_the_part_that_is_asked_for(tune: str | None, moves: set[str]) -> None:
    method = build_method("fedbabu", HOW | {"tune": tune}, 3)
    ctx = after_a_round(tune=tune)
    common = {spec.name: ctx.params[spec.name].detach().clone() for spec in ctx.params.specs}
    method.personaliser(replace(ctx, stage="personalise"))
    moved = set()
    for adapted, layer in zip(ctx.net.adapted, ctx.net.layers, strict=True):
        start = common.get(f"lora_B.{adapted.name}", torch.zeros(1, dtype=torch.float64))
        if (layer.b.detach() != start).any():
            moved.add("head" if adapted.name == "classifier" else "body")
    assert moved == moves


def test_a_language_model_is_tuned_as_a_whole_and_its_head_cannot_be_asked_for() -> None:
    method = build_method("fedbabu", HOW, 3)
    ctx = toy_context(toy_llama(), with_prompts(toy_lanes([9, 5])), method.adapter, budgets=(3,), r_max=3)
    made = method.personaliser(replace(ctx, stage="personalise"))
    assert all(bool(layer.b.any()) for layer in ctx.net.layers)
    assert len(made.lanes) == 2
    assert Capability.CLASSES in build_method("fedbabu", {"tune": "head"}, 3).requires
    with pytest.raises(ConfigError, match=r"^'fedbabu.tune': head needs a classifier.*leave the key out$"):
        compose(["demo_generation"], ["methods=[fedbabu]", "fedbabu.tune=head"])
