"""Longer and shorter rows of a step by themselves: the same step with less padding."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import toy_context, toy_extractor, toy_lanes, toy_llama, toy_net, with_prompts, with_spans

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.lanes import parts as parts_module
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.lanes.parts import by_length, cheapest_ends, part_tokens
from fedtailor.training.local import Training, backward, cross_entropy_of, train


def step_of(kind: str, sizes: list[int]) -> tuple[ClientContext, LaneBatch]:
    lanes = toy_lanes(sizes)
    nets = {"classification": toy_net, "generation": toy_llama, "extraction": toy_extractor}
    made = {"classification": list, "generation": with_prompts, "extraction": with_spans}[kind](lanes)
    ctx = toy_context(nets[kind](), made, LoraAdapter(2, 2.0, Scope.SHARED))
    for spec in ctx.params.specs:
        if "lora_B" in spec.name:
            ctx.params.set(spec.name, torch.linspace(-1, 1, spec.size).view(spec.shape))
    [batch] = ctx.batches([[np.arange(lane.size)] for lane in ctx.lanes])
    return ctx, batch


@pytest.mark.parametrize("kind", ["classification", "generation", "extraction"])
@pytest.mark.parametrize("overhead", [0, 5, 20])
def test_parts_by_length_add_up_to_the_step(kind: str, overhead: float) -> None:
    ctx, batch = step_of(kind, [8, 5, 1])
    assert part_tokens(ctx.net) > 1e4, "a toy model is not worth a cut, so the whole step is one pass"
    gradient = ctx.params.slices([spec.name for spec in ctx.params.specs])[0].grad
    whole, wanted = backward(ctx, batch, cross_entropy_of(ctx)), gradient.clone()
    gradient.zero_()
    total, parts = torch.zeros(3, dtype=torch.float64), by_length(batch, overhead)
    for part in parts:
        values = lane_cross_entropy(ctx.net.logits(part), part) * part.step_share
        values.sum().backward()
        total += values.detach()
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)
    padded = sum(part.input_ids.numel() for part in parts)
    assert len(parts) > 1
    assert padded + overhead * (len(parts) - 1) < batch.input_ids.numel()
    assert not overhead or len(parts) < len(by_length(batch, 0))


def test_segments_go_with_their_rows() -> None:
    _, batch = step_of("classification", [8, 5, 1])
    typed = replace(batch, token_type_ids=batch.input_ids % 2)
    for part in by_length(typed, 0):
        assert part.token_type_ids is not None
        assert torch.equal(part.token_type_ids, part.input_ids % 2)
        assert int(part.attention_mask.sum(2).max()) == part.input_ids.shape[2], "as wide as its longest text"


def test_what_is_not_worth_a_part_stays_as_it_is() -> None:
    _, batch = step_of("classification", [8, 5, 1])
    assert by_length(batch, math.inf) == [batch]


@pytest.mark.parametrize("overhead", [0, 3, 7, 30])
def test_the_cut_is_the_cheapest_of_all(overhead: float) -> None:
    def cost(ends: tuple[int, ...]) -> float:
        starts = (0, *ends[:-1])
        return overhead * (len(ends) - 1) + sum(
            2 * (b - a) * max(widths[a:b]) for a, b in zip(starts, ends, strict=True)
        )

    for seed in range(5):
        widths = sorted(np.random.default_rng(seed).integers(1, 20, 7).tolist(), reverse=True)
        inner = range(1, len(widths))
        every = [(*cuts, len(widths)) for n in range(len(widths)) for cuts in itertools.combinations(inner, n)]
        assert cost(tuple(cheapest_ends(widths, 2, overhead))) == min(map(cost, every))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_is_the_same_with_and_without_cuts(dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []

    def counted(batch: LaneBatch, overhead: float) -> list[LaneBatch]:
        found = by_length(batch, overhead)
        counts.append(len(found))
        return found

    def trained(weights: float) -> torch.Tensor:
        monkeypatch.setattr(parts_module, "PART_WEIGHTS", weights)
        monkeypatch.setattr(parts_module, "by_length", counted)
        ctx = toy_context(toy_llama(), with_prompts(toy_lanes([9, 4])), LoraAdapter(2, 2.0, Scope.EPHEMERAL))
        groups = [AdamGroup(tuple(spec.name for spec in ctx.params.specs), 1e-2)]
        trace = train(ctx, groups, Training(2, 4, dropout=dropout))
        return torch.cat([trace.loss, ctx.params.flat(Scope.EPHEMERAL).flatten()])

    torch.testing.assert_close(trained(1.0), trained(math.inf), rtol=1e-6, atol=1e-9)
    # What is dropped is drawn row by row: it must not depend on how a group is cut.
    assert not counts if dropout else max(counts) > 1
