"""A step in parts whose gradients add up to those of the whole: by rows, for memory, and by length, against padding.

Texts of one step differ in length, and all are padded to the longest: of short instructions half of what is computed
can be padding. A part of its own for the shorter rows saves that, and costs the beginning of its operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet

PART_WEIGHTS: Final = 3e7
"""Weights of a linear layer that one token is multiplied with, forward and backward, in the time that it takes to begin
all of a layer's operations, on a CPU. Part of the numbers (to rounding), so no setting."""


def part_tokens(net: LaneNet) -> float:
    """Tokens whose passes take as long as beginning them once more; infinite on a GPU, which wants large products."""
    sizes = [layer.d_in * layer.d_out for layer in net.adapted]
    return PART_WEIGHTS * len(sizes) / sum(sizes) if sizes and net.device.type == "cpu" else math.inf


def step_parts(net: LaneNet, batch: LaneBatch, rows: int | None) -> list[LaneBatch]:
    """The parts in which a step's gradients are computed: by rows where ``rows`` or ranks ask for it, else by length.

    Under adapter dropout a step stays whole: what a lane draws would depend on its group's cut.

    Args:
        net: what computes them.
        batch: a whole step.
        rows: most rows of a part; None: no limit.
    """
    ranks = net.ranks
    if ranks or rows:
        return micro_batches(batch, rows, (ranks.index, ranks.size) if ranks else (0, 1))
    return [batch] if net.state.dropout else by_length(batch, part_tokens(net))


def micro_batches(batch: LaneBatch, rows: int | None, ranks: tuple[int, int] = (0, 1)) -> list[LaneBatch]:
    """A step cut into parts of at most ``rows`` rows per lane, each with its share of the targets.

    The gradients of ``step_share * mean over the part's targets`` add up to those of the mean over the step's targets.

    Args:
        batch: a whole step.
        rows: most rows of a part; None: no limit.
        ranks: (index, size) of a group whose members go through a step together: the parts are dealt out in turn.
            All members get equally many parts; who has too few repeats one at share 0.
    """
    index, size = ranks
    b = batch.input_ids.shape[1]
    most = min(rows or b, -(-b // size))
    if most >= b and size == 1:
        return [batch]
    starts = list(range(0, b, most))
    turns = -(-len(starts) // size)
    parts = []
    for turn in range(turns):
        number = turn * size + index
        part = _part(batch, starts[min(number, len(starts) - 1)], most)
        if number >= len(starts):
            assert part.step_share is not None
            part = replace(part, step_share=torch.zeros_like(part.step_share))
        parts.append(part)
    return parts


def by_length(batch: LaneBatch, overhead: float) -> list[LaneBatch]:
    """A step cut into longer and shorter rows, so that little padding is computed; with shares, as `micro_batches`.

    Args:
        batch: a whole step.
        overhead: tokens whose computation costs as much as one more part. `math.inf`: nothing is cut.
    """
    if batch.attention_mask.numel() <= overhead:
        return [batch]  # no cut can save as much as it costs
    lengths = batch.attention_mask.sum(2)
    last = torch.tensor([rows - 1 for rows, _ in batch.shapes], device=lengths.device).unsqueeze(1)
    column = torch.arange(lengths.shape[1], device=lengths.device)
    # Longest first; what only fills a lane up comes last, and is its shortest text from now on.
    order = torch.where(column > last, -1, lengths).argsort(dim=1, descending=True, stable=True)
    widths = lengths.gather(1, order.gather(1, torch.minimum(column, last))).amax(0).tolist()
    ends = cheapest_ends(widths, batch.lanes, overhead)
    if len(ends) == 1:
        return [batch]
    batch = _reordered(batch, order, torch.minimum(column, last))
    return [
        _part(batch, start, end - start, max(widths[start:end]))
        for start, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def cheapest_ends(widths: Sequence[int], lanes: int, overhead: float) -> list[int]:
    """Where each part ends for which ``lanes`` x rows x width plus ``overhead``, over all parts, is least."""
    n = len(widths)
    if lanes * (n * max(widths) - sum(widths)) <= overhead:
        return [n]  # all padding together costs no more than one part
    least, end = [0.0] * (n + 1), [n] * n
    for start in reversed(range(n)):
        width, least[start] = 0, math.inf
        for stop in range(start + 1, n + 1):
            width = max(width, widths[stop - 1])
            cost = lanes * (stop - start) * width + (overhead if stop < n else 0) + least[stop]
            if cost <= least[start]:  # of equal costs the larger part, so that there are fewer
                least[start], end[start] = cost, stop
    ends = [end[0]]
    while ends[-1] < n:
        ends.append(end[ends[-1]])
    return ends


def _reordered(batch: LaneBatch, order: Tensor, taken: Tensor) -> LaneBatch:
    """The rows of each lane in the order (k, b); row i shows the text of row ``taken[i]`` there, (k, b)."""
    b, t = batch.input_ids.shape[1:]
    across = order.gather(1, taken).unsqueeze(2).expand(-1, -1, t)
    types = batch.token_type_ids
    batch = replace(
        batch,
        input_ids=batch.input_ids.gather(1, across),
        attention_mask=batch.attention_mask.gather(1, across),
        token_type_ids=None if types is None else types.gather(1, across),
    )
    if batch.positions is None or batch.target_row is None:
        # As many targets in every row; `valid`: real rows come first, as before.
        labels = batch.labels.reshape(batch.lanes, b, -1)
        return replace(batch, labels=labels.gather(1, order.unsqueeze(2).expand_as(labels)).flatten(1))
    now_at = torch.zeros_like(order).scatter_(1, order, torch.arange(b, device=order.device).expand_as(order))
    target_row = now_at.gather(1, batch.target_row)
    return replace(batch, target_row=target_row, positions=target_row * t + batch.positions % t)


def _part(batch: LaneBatch, start: int, rows: int, width: int | None = None) -> LaneBatch:
    """Rows ``start`` to ``start + rows`` of every lane, ``width`` tokens of each (None: all).

    A lane without rows there keeps one target of share 0.
    """
    b, t = batch.input_ids.shape[1:]
    width = width or t
    end = min(start + rows, b)
    each = batch.labels.shape[1] // b  # targets of a row, where all have as many
    here = batch.valid[:, each * start : each * end]
    if batch.positions is not None and batch.target_row is not None:
        here = batch.valid & (batch.target_row >= start) & (batch.target_row < end)
    counts = here.sum(1)
    if batch.positions is None or batch.target_row is None:
        column = torch.arange(here.shape[1], device=counts.device)
        taken: dict[str, Any] = {
            "labels": batch.labels[:, each * start : each * end],
            "valid": column < counts.clamp_min(1).unsqueeze(1),
            "target_row": None if batch.target_row is None else batch.target_row[:, : here.shape[1]],
        }
    else:
        m = max(1, int(counts.max()))
        # Stable: targets keep their order; those of other parts go to the end, where `valid` is False.
        order = torch.argsort((~here).to(torch.int8), dim=1, stable=True)[:, :m]
        target_row = (batch.target_row.gather(1, order) - start).clamp(0, end - start - 1)
        taken = {
            "labels": batch.labels.gather(1, order),
            "valid": torch.arange(m, device=counts.device) < counts.clamp_min(1).unsqueeze(1),
            "positions": target_row * width + (batch.positions.gather(1, order) % t).clamp_max(width - 1),
            "target_row": target_row,
        }
    shapes = tuple((max(0, min(n, end) - start), min(own, width)) for n, own in batch.shapes)
    types = batch.token_type_ids
    return replace(
        batch,
        input_ids=batch.input_ids[:, start:end, :width],
        attention_mask=batch.attention_mask[:, start:end, :width],
        shapes=shapes,
        token_type_ids=None if types is None else types[:, start:end, :width],
        step_share=counts.double() / batch.valid.sum(1),
        **taken,
    )
