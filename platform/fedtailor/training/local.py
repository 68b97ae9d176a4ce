"""The inner loop that every gradient-based client function runs: epochs of Adam over lanes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtailor.federated.checks import check_loss
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.adam import AdamGroup, LaneAdam, LaneOptimizer
from fedtailor.lanes.batches import IntArray, LaneBatch
from fedtailor.lanes.loss import lane_losses
from fedtailor.lanes.params import clip_lanes
from fedtailor.lanes.parts import step_parts

LaneLoss = Callable[[LaneBatch], Tensor]
AfterBackward = Callable[[LaneBatch, int], None]
AfterStep = Callable[[int], None]


@dataclass(frozen=True)
class Training:
    """How one call of `train` runs.

    Args:
        epochs: passes over the local data.
        batch_size: rows of a step.
        purpose: coordinate of the data order; calls with the same purpose see the same order.
        max_grad_norm: clip each lane's gradient over ``clip_groups`` to this norm; None: no clipping.
        clip_groups: indices of the groups that are measured and clipped together.
        dropout: probability of adapter dropout.
        own_dropout: the model keeps its own dropout (full fine-tuning).
        steps: exactly so many steps, in as many passes as that takes, in the place of ``epochs``.
    """

    epochs: int
    batch_size: int
    purpose: str = "train"
    max_grad_norm: float | None = None
    clip_groups: tuple[int, ...] = (0,)
    dropout: float = 0.0
    own_dropout: bool = False
    steps: int | None = None


@dataclass(frozen=True)
class Trace:
    """What happened: mean loss over each lane's steps (K,), and steps (K,)."""

    loss: Tensor
    steps: Tensor


def cross_entropy_of(ctx: ClientContext) -> LaneLoss:
    """Mean cross-entropy of each running lane, (k,)."""
    return lambda batch: lane_losses(ctx.net, batch)


def backward(ctx: ClientContext, batch: LaneBatch, loss: LaneLoss) -> Tensor:
    """Adds the gradient of a step's loss to ``ctx.params``, part by part, over all ranks; the loss of each lane, (k,).

    The result is that of the whole step, to rounding, see `step_parts`; dropout of the base is drawn part by part.

    Raises:
        MethodError: a loss that is not (k,).
    """
    ranks, total = ctx.net.ranks, torch.zeros(batch.lanes, dtype=torch.float64, device=ctx.net.device)
    if ranks and ranks.index:
        # A gradient that is kept over steps (a switch) is counted once, on rank 0.
        ctx.params.zero_gradients()
    for part in step_parts(ctx.net, batch, ctx.micro_batch):
        values = check_loss(loss(part), part.lanes)
        if part.step_share is not None:
            values = values * part.step_share.to(values.dtype)
        values.sum().backward()  # type: ignore[no-untyped-call]
        total += values.detach()
    if ranks:
        ctx.params.sum_gradients(ranks)
        ranks.sum_(total)
    return total


def train(
    ctx: ClientContext,
    trained: Sequence[AdamGroup] | LaneOptimizer,
    how: Training,
    loss: LaneLoss | None = None,
    after_backward: AfterBackward | None = None,
    after_step: AfterStep | None = None,
) -> Trace:
    """Trains ``ctx.params`` in place.

    The total loss is the sum over lanes of per-lane means, so every lane's gradient is its own.

    Args:
        ctx: lanes ordered by falling training size.
        trained: what is trained, at which rate, by Adam from its start; or an optimizer, which goes on.
        how: epochs, batch size, clipping, dropout.
        loss: (k,) loss of the running lanes; cross-entropy by default.
        after_backward: called with the batch and step number before clipping, e.g. to log a gradient's parts.
        after_step: called with the step number after the optimizer, gradients still there, e.g. to prune ranks.
    """
    loss = loss or cross_entropy_of(ctx)
    optimizer = LaneAdam(ctx.params, trained) if isinstance(trained, Sequence) else trained
    clipped = [s for index in how.clip_groups for s in optimizer.slices[index]]
    indices = step_rows(ctx, how)
    totals = torch.zeros(len(ctx.lanes), dtype=torch.float64, device=ctx.net.device)
    for group in optimizer.slices:
        for s in group:
            s.grad.zero_()
    if how.dropout:
        ctx.use_dropout(how.dropout, how.purpose)
    ctx.net.train_mode(True, how.own_dropout)
    try:
        for step, batch in enumerate(ctx.batches(indices)):
            optimizer.zero_grad()
            totals[: batch.lanes] += backward(ctx, batch, loss)
            if after_backward:
                after_backward(batch, step)
            if how.max_grad_norm is not None:
                clip_lanes(clipped, how.max_grad_norm, batch.lanes)
            optimizer.step(batch.lanes)
            if after_step:
                after_step(step)
    finally:
        ctx.net.train_mode(False)
    steps = torch.tensor([len(p) for p in indices], device=totals.device)
    return Trace(totals / steps, steps)


def step_rows(ctx: ClientContext, how: Training) -> list[list[IntArray]]:
    """Rows of every step of every lane."""
    if how.steps is None:
        return ctx.training_order(how.epochs, how.batch_size, how.purpose)
    passes = max(math.ceil(how.steps / math.ceil(lane.size / how.batch_size)) for lane in ctx.lanes)
    return [lane[: how.steps] for lane in ctx.training_order(passes, how.batch_size, how.purpose)]
