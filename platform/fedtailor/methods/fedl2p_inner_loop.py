"""FedL2P's inner loop: fine-tuning at one learning rate per client and weight matrix, whose last update is remembered.

A client's training texts are split once more: some are held out to validate on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedtailor.adapters.lora import lora_names
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.context import ClientContext, Lane
from fedtailor.lanes.adam import AdamGroup, LaneAdam
from fedtailor.lanes.batches import Examples, IntArray, LaneBatch
from fedtailor.lanes.loss import target_losses
from fedtailor.lanes.params import clip_lanes
from fedtailor.training.local import backward, cross_entropy_of


@dataclass(frozen=True)
class InnerLoop:
    """How one call of `fine_tune` runs.

    Args:
        epochs: passes over the training texts.
        batch_size: rows of a batch.
        purpose: coordinate of the data order.
        max_grad_norm: clip each lane's gradient to this norm; None: no clipping.
        dropout: probability of adapter dropout.
        constant_correction: see `LaneAdam`.
        hold_first: an epoch's first batch makes no update, its gradient is added to the second's (a reference bug).
    """

    epochs: int
    batch_size: int
    purpose: str
    max_grad_norm: float | None = None
    dropout: float = 0.0
    constant_correction: bool = False
    hold_first: bool = False


@dataclass(frozen=True)
class FineTuned:
    """What `fine_tune` leaves besides the parameters.

    Args:
        loss: mean over each lane's batches, (K,) float64.
        direction: u of each lane's last update, A and B of each layer in turn, (K, *shape).
    """

    loss: Tensor
    direction: list[Tensor]


def steps_of(indices: Sequence[IntArray], epochs: int, hold_first: bool) -> list[list[IntArray]]:
    """The batches of every update: one each, unless an epoch's first batch waits for the next update.

    >>> [len(step) for step in steps_of([[0], [1], [2], [3], [4], [5]], 2, True)]
    [2, 1, 2, 1]
    >>> [len(step) for step in steps_of([[0], [1]], 2, True)]
    [2]
    """
    per_epoch = len(indices) // epochs
    steps: list[list[IntArray]] = []
    waiting: list[IntArray] = []
    for number, index in enumerate(indices):
        waiting.append(index)
        if not hold_first or number % per_epoch or number == len(indices) - 1:
            steps.append(waiting)
            waiting = []
    return steps


def fine_tune(ctx: ClientContext, rates: Tensor, how: InnerLoop) -> FineTuned:
    """Trains A and B in ``ctx.params`` with Adam on the cross-entropy.

    Args:
        ctx: lanes ordered by falling training size, LoRA bound.
        rates: (K, 2L), A then B of each layer.
        how: epochs, batches and switches.
    """
    names = lora_names(ctx.net)
    optimizer = LaneAdam(ctx.params, [AdamGroup(names, rates)], constant_correction=how.constant_correction)
    indices = ctx.training_order(how.epochs, how.batch_size, how.purpose)
    steps = [steps_of(lane, how.epochs, how.hold_first) for lane in indices]
    totals = torch.zeros(len(ctx.lanes), dtype=torch.float64, device=ctx.net.device)
    if how.dropout:
        ctx.use_dropout(how.dropout, how.purpose)
    ctx.net.train_mode(True)
    try:
        for number, batch in enumerate(ctx.batches([[np.concatenate(step) for step in lane] for lane in steps])):
            optimizer.zero_grad()
            if how.hold_first:
                losses = _loss(target_losses(ctx.net, batch), batch, [lane[number] for lane in steps[: batch.lanes]])
                losses.sum().backward()  # type: ignore[no-untyped-call]
                totals[: batch.lanes] += losses.detach()
            else:
                totals[: batch.lanes] += backward(ctx, batch, cross_entropy_of(ctx))
            if how.max_grad_norm is not None:
                clip_lanes(optimizer.slices[0], how.max_grad_norm, batch.lanes)
            optimizer.step(batch.lanes)
    finally:
        ctx.net.train_mode(False)
    direction = optimizer.directions()
    batches = torch.tensor([len(lane) for lane in indices], device=totals.device)
    return FineTuned(totals / batches, [direction[name] for name in names])


def _loss(each: Tensor, batch: LaneBatch, steps: Sequence[Sequence[IntArray]]) -> Tensor:
    """The sum over each lane's batches, which share a step, of the means of their targets' losses (k, m); (k,)."""
    k, m = each.shape
    rows = each.new_zeros(max(len(step) for step in steps), k, m)
    target_row = torch.arange(m, device=each.device).expand(k, m) if batch.target_row is None else batch.target_row
    for lane, step in enumerate(steps):
        start = 0
        for part, index in enumerate(step):
            own = (target_row[lane] >= start) & (target_row[lane] < start + len(index))
            rows[part, lane] = (own & batch.valid[lane]).to(each.dtype)
            start += len(index)
    return ((each * rows).sum(2) / rows.sum(2).clamp_min(1)).sum(0)


def held_out(size: int, share: float) -> int:
    """Texts to hold out: the share, rounded half up, but at least one on each side.

    A larger client never keeps fewer training texts than a smaller one, so the order of lanes survives the split.

    >>> [held_out(n, 0.2) for n in (2, 4, 5, 12, 13, 100)]
    [1, 1, 1, 2, 3, 20]
    """
    return min(max(1, int(share * size + 0.5)), size - 1)


def split(lane: Lane, seed: int, share: float) -> tuple[Lane, Examples]:
    """A lane with its remaining training texts, and those held out.

    The split is named by (seed, client) alone: every round, budget and method that asks sees the same one. A client
    with a single text has it on both sides.
    """
    order = numpy_rng(seed, lane.client.id, "validation").permutation(lane.size)
    cut = held_out(lane.size, share)
    validation, train = (order[:cut], order[cut:]) if cut else (order, order)
    return replace(lane, train=lane.train.rows(np.sort(train))), lane.train.rows(np.sort(validation))


def split_lanes(ctx: ClientContext, share: float) -> tuple[ClientContext, list[Examples]]:
    """All lanes split; see `split`."""
    pairs = [split(lane, ctx.seed, share) for lane in ctx.lanes]
    return replace(ctx, lanes=tuple(lane for lane, _ in pairs)), [rows for _, rows in pairs]
