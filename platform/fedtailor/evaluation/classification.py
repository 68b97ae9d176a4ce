"""Text classification: loss and accuracy, per lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedtailor.lanes.batches import Examples, LaneBatch, make_batch


@dataclass(frozen=True)
class Score:
    """Counts over a lane's targets: test texts, or the tokens of test responses."""

    correct: int
    loss_sum: float
    count: int


@torch.no_grad()
def evaluate(
    logits: Callable[[LaneBatch], Tensor],
    tests: Sequence[Examples],
    pad_id: int,
    token_budget: int,
    device: torch.device | str = "cpu",
) -> list[Score]:
    """Scores every lane on its own test texts.

    Args:
        logits: (k, b, C) of a batch over the first k lanes.
        tests: one test set per lane, in lane order.
        pad_id: padding token.
        token_budget: tokens of one step over all lanes.
        device: where batches go.
    """
    sizes = [len(t.labels) for t in tests]
    # Long ones first, side by side: little padding, and the largest step comes first.
    order = [np.argsort(-t.lengths, kind="stable") for t in tests]
    correct, count = np.zeros(len(tests), np.int64), np.zeros(len(tests), np.int64)
    losses = np.zeros(len(tests), np.float64)
    start = 0
    while start < max(sizes):
        width = max(int(t.lengths[own[start]]) for t, own in zip(tests, order, strict=True) if start < len(own))
        stop = start + max(1, token_budget // (len(tests) * width))
        # Lanes are ordered by training size, so any of them may run out of test texts first: it stays in the
        # batch with its shortest text, which is not counted again.
        indices = [own[start:stop] if start < len(own) else own[-1:] for own in order]
        batch = make_batch(tests, indices, pad_id, device)
        alive = torch.tensor([start < n for n in sizes], device=batch.valid.device)
        counted = batch.valid & alive.unsqueeze(1)
        scores = logits(batch)
        k, b, classes = scores.shape
        each = functional.cross_entropy(scores.reshape(k * b, classes), batch.labels.reshape(k * b), reduction="none")
        hits = (scores.argmax(-1) == batch.labels) & counted
        correct += hits.sum(1).cpu().numpy()
        losses += (each.view(k, b).double() * counted).sum(1).cpu().numpy()
        count += counted.sum(1).cpu().numpy()
        start = stop
    return [Score(int(c), float(loss), int(n)) for c, loss, n in zip(correct, losses, count, strict=True)]
