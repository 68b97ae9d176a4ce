"""A step on instructions is a classification of every response token; a step cut into parts is the same step."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional
from toy import as_talk, toy_context, toy_examples, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.evaluation.classification import evaluate
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import Examples, make_batch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.lanes.parts import micro_batches
from fedtailor.training.local import Training, backward, cross_entropy_of, train

TALK = Examples(
    np.array([[7, 8, 9, 10, 0], [11, 12, 13, 14, 15]]),
    np.array([4, 5]),
    np.array([0, 1]),
    prompt_length=np.array([2, 4]),
)


def test_targets_are_the_response_tokens_and_nothing_else() -> None:
    batch = make_batch([TALK], [np.array([0, 1])], 0)
    assert batch.labels.tolist() == [[9, 10, 15]]
    assert batch.target_row.tolist() == [[0, 0, 1]]
    assert batch.positions.tolist() == [[1, 2, 8]]  # each the token before it; the second row starts at 5
    assert batch.valid.all()


def test_a_lane_with_fewer_response_tokens_is_masked() -> None:
    short = Examples(np.array([[7, 8, 9]]), np.array([3]), np.array([0]), prompt_length=np.array([2]))
    batch = make_batch([TALK, short], [np.array([0, 1]), np.array([0])], 0)
    assert batch.valid.tolist() == [[True, True, True], [True, False, False]]


def test_the_loss_is_that_of_the_whole_model_at_these_tokens() -> None:
    net = toy_llama()
    [lane] = with_prompts(toy_lanes([6]))
    batch = make_batch([lane.train], [np.arange(6)], 0)
    loss = lane_cross_entropy(net.logits(batch), batch)
    whole = net.model(input_ids=batch.input_ids[0], attention_mask=batch.attention_mask[0]).logits
    targets = batch.input_ids[0].clone()
    for row, (prompt, length) in enumerate(zip(lane.train.prompt_length, lane.train.lengths, strict=True)):
        targets[row, :prompt] = targets[row, length:] = -100
    own = functional.cross_entropy(whole[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(loss[0], own)


@pytest.mark.parametrize("kind", ["classification", "generation"])
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (3, 1), (None, 2), (2, 3), (5, 2)])
def test_the_parts_of_a_step_add_up_to_the_step(kind: str, rows: int | None, size: int) -> None:
    lanes = toy_lanes([8, 5, 1])
    if kind == "generation":
        lanes = with_prompts(lanes)
    net = toy_net() if kind == "classification" else toy_llama()
    ctx = toy_context(net, lanes, LoraAdapter(2, 2.0, Scope.SHARED))
    for name in [spec.name for spec in ctx.params.specs if "lora_B" in spec.name]:
        ctx.params.set(name, torch.linspace(-1, 1, ctx.params[name][0].numel()).view(ctx.params[name][0].shape))
    [batch] = ctx.batches([[np.arange(lane.size)] for lane in lanes])
    gradient = ctx.params.slices([spec.name for spec in ctx.params.specs])[0].grad
    whole = backward(ctx, batch, cross_entropy_of(ctx))
    wanted = gradient.clone()
    gradient.zero_()
    total = torch.zeros(3, dtype=torch.float64)
    counts = []
    for index in range(size):
        parts = micro_batches(batch, rows, (index, size))
        counts.append(len(parts))
        for part in parts:
            values = lane_cross_entropy(net.logits(part), part)
            values = values if part.step_share is None else values * part.step_share
            values.sum().backward()
            total += values.detach()
    assert len(set(counts)) == 1, "all ranks go through equally many forward passes"
    torch.testing.assert_close(total, whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulation_and_checkpointing_change_nothing(checkpointing: bool) -> None:
    def trained(micro_batch: int | None, checkpointing: bool) -> torch.Tensor:
        net = toy_llama(checkpointing=checkpointing)
        ctx = toy_context(
            net, with_prompts(toy_lanes([9, 4])), LoraAdapter(2, 2.0, Scope.EPHEMERAL), micro_batch=micro_batch
        )
        names = [spec.name for spec in ctx.params.specs]
        trace = train(ctx, [AdamGroup(tuple(names), 1e-2)], Training(2, 4))
        return torch.cat([trace.loss, ctx.params.flat(Scope.EPHEMERAL).flatten()])

    torch.testing.assert_close(trained(3, checkpointing), trained(None, False), rtol=1e-6, atol=1e-9)


def test_a_fixed_number_of_steps_takes_as_many_passes_as_it_needs() -> None:
    ctx = toy_context(toy_net(), toy_lanes([9, 2]), LoraAdapter(2, 2.0, Scope.EPHEMERAL))
    names = tuple(spec.name for spec in ctx.params.specs)
    trace = train(ctx, [AdamGroup(names, 1e-2)], Training(1, 4, steps=5))
    assert trace.steps.tolist() == [5, 5]


def test_scores_count_response_tokens() -> None:
    net, talk = toy_llama(), as_talk(toy_examples("a", 7), "a")
    [small], [large] = (evaluate(net.logits, [talk], 0, budget) for budget in (9, 4096))
    assert small.count == large.count == int((talk.lengths - talk.prompt_length).sum())
    assert small.loss_sum == pytest.approx(large.loss_sum, rel=1e-9)
