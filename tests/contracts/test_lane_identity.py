"""K lanes in one forward pass are K runs of one lane (the identity that all speed rests on)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import (
    as_spans,
    as_talk,
    toy_context,
    toy_examples,
    toy_extractor,
    toy_lanes,
    toy_llama,
    toy_net,
    with_prompts,
    with_spans,
)

from fedtailor.core.scope import Scope
from fedtailor.evaluation.classification import evaluate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Personalised
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import METHODS, build_method

RAGGED = [13, 9, 8, 3]
TINY = {name: entry.tiny for name, entry in METHODS.items()}
LANED = [name for name in METHODS if build_method(name, TINY[name] or {}, 4).lanes]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_tiny_configuration(name: str) -> None:
    assert TINY[name] is not None, f"the ENTRY of {name} needs `tiny`, a small section for the contracts"
    assert METHODS[name].name == name


def context(net: LaneNet, name: str, lanes: list, **more: object) -> ClientContext:
    method = build_method(name, TINY[name], 4)
    return toy_context(net, lanes, method.adapter, method.modules, r_max=4, **more)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-9, "atol": 1e-12} if dtype is torch.float64 else {"rtol": 1e-4, "atol": 1e-4}


NETS = {"classification": toy_net, "generation": toy_llama, "extraction": toy_extractor}
"""Kind of task -> base model; every method does all."""


def lanes_of(kind: str) -> list:
    lanes = toy_lanes(RAGGED)
    return {"classification": list, "generation": with_prompts, "extraction": with_spans}[kind](lanes)


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", [n for n in LANED if build_method(n, TINY[n], 4).local_update])
def test_a_round_of_k_lanes_is_k_rounds_of_one(name: str, kind: str) -> None:
    close = tolerance(torch.float64)
    if kind == "extraction":  # the bias of all tokens' scores has the gradient 0, whose rounding Adam makes a step of
        close["atol"] = 1e-9
    method, lanes, net = build_method(name, TINY[name], 4), lanes_of(kind), NETS[kind]
    together = context(net(), name, lanes)
    report = method.local_update(together)
    for k, lane in enumerate(lanes):
        alone = context(net(), name, [lane])
        own = method.local_update(alone)
        for scope in (Scope.SHARED, Scope.PRIVATE, Scope.EPHEMERAL):
            torch.testing.assert_close(together.params.flat(scope)[k], alone.params.flat(scope)[0], **close)
        for metric, values in report.metrics.items():
            torch.testing.assert_close(values[k], own.metrics[metric][0], rtol=1e-7, atol=1e-10)


def personalise(name: str, net: LaneNet, lanes: list) -> tuple[Personalised, list, torch.Tensor]:
    method = build_method(name, TINY[name], 4)
    ctx = context(net, name, lanes, budgets=(4,) if method.per_budget else (1, 2, 4))
    ctx = replace(ctx, stage="personalise")
    made = method.personaliser(ctx)
    tests = [toy_examples(f"{lane.client.id}/test", 7) for lane in made.lanes]
    if lanes[0].train.prompt_length is not None:
        tests = [as_talk(test, lane.client.id) for test, lane in zip(tests, made.lanes, strict=True)]
    if lanes[0].train.spans is not None:
        tests = [as_spans(test, lane.client.id) for test, lane in zip(tests, made.lanes, strict=True)]
    scores = evaluate(made.logits, tests, 0, 64)
    return made, scores, made.ranks if made.ranks is not None else torch.zeros(0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("name", LANED)
def test_personalising_k_clients_at_all_budgets_is_one_at_a_time(name: str, kind: str, dtype: torch.dtype) -> None:
    if kind != "classification" and Capability.CLASSES in build_method(name, TINY[name], 4).requires:
        return  # the configuration refuses it
    lanes, net = lanes_of(kind), NETS[kind]
    _, scores, ranks = personalise(name, net(dtype), lanes)
    each = len(scores) // len(lanes)
    for k, lane in enumerate(lanes):
        _, own, own_ranks = personalise(name, net(dtype), [lane])
        assert own_ranks.tolist() == ranks[k * each : (k + 1) * each].tolist()
        for mine, theirs in zip(scores[k * each : (k + 1) * each], own, strict=True):
            assert mine.correct == theirs.correct
            assert mine.loss_sum == pytest.approx(theirs.loss_sum, **_approx(dtype))


def _approx(dtype: torch.dtype) -> dict[str, float]:
    return {"rel": 1e-9} if dtype is torch.float64 else {"rel": 2e-3}


def test_one_step_in_float32_agrees_to_rounding() -> None:
    from fedtailor.lanes.loss import lane_cross_entropy

    lanes = toy_lanes([4, 3, 2])
    grads, losses = [], []
    for group in [lanes, *[[lane] for lane in lanes]]:
        net = toy_net(torch.float32)
        ctx = context(net, "fedavg", group)
        for name in ("lora_B.classifier", "lora_B.bert.encoder.layer.0.output.dense"):
            ctx.params.set(name, torch.linspace(-1, 1, ctx.params[name][0].numel()).view(ctx.params[name][0].shape))
        batch = next(iter(ctx.batches(ctx.training_order(1, 4, "train"))))
        loss = lane_cross_entropy(net.logits(batch), batch)
        loss.sum().backward()
        losses.append(loss.detach())
        grads.append(torch.stack([ctx.params["lora_A.classifier"].grad[k].clone() for k in range(len(group))]))
    torch.testing.assert_close(losses[0], torch.cat(losses[1:]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0], torch.cat(grads[1:]), rtol=1e-5, atol=1e-6)


def test_lanes_out_of_order_are_refused() -> None:
    from fedtailor.lanes.batches import lane_batches

    lanes = toy_lanes([9, 3])[::-1]
    ctx = context(toy_net(), "fedavg", lanes)
    with pytest.raises(ValueError, match="falling number of steps"):
        list(lane_batches([x.train for x in lanes], ctx.training_order(1, 4, "train"), 0))
