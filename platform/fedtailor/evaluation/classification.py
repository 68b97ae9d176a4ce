"""Text classification: loss, accuracy and Matthews correlation, per lane."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedtailor.lanes.batches import Examples, LaneBatch, scoring_batches

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Score:
    """Counts over a lane's targets: test texts, or the tokens of test responses.

    Args:
        correct: targets whose highest score is that of their class.
        loss_sum: nats.
        count: targets.
        confusion: targets of class i that were answered with class j, (C, C); None where it was not asked for.
    """

    correct: int
    loss_sum: float
    count: int
    confusion: Counts | None = None


def matthews(confusion: Counts) -> float:
    """Matthews correlation coefficient, of C classes in general; 0 where labels or answers are of one class.

    Args:
        confusion: as `Score` has it, (C, C).

    >>> round(matthews(np.array([[2, 1], [0, 3]])), 4), matthews(np.array([[0, 3], [0, 5]]))
    (0.7071, 0.0)
    """
    from sklearn.metrics import matthews_corrcoef  # half a second that few tasks need

    true, answered = np.indices(confusion.shape).reshape(2, -1)
    return float(matthews_corrcoef(true, answered, sample_weight=confusion.ravel()))


@torch.no_grad()
def evaluate(
    logits: Callable[[LaneBatch], Tensor],
    tests: Sequence[Examples],
    pad_id: int,
    token_budget: int,
    device: torch.device | str = "cpu",
    confusion: bool = False,
) -> list[Score]:
    """Scores every lane on its own test texts.

    Args:
        logits: (k, b, C) of a batch over the first k lanes.
        tests: one test set per lane, in lane order.
        pad_id: padding token.
        token_budget: tokens of one step over all lanes.
        device: where batches go.
        confusion: count answers of each class by the class that they should have.
    """
    correct, count = np.zeros(len(tests), np.int64), np.zeros(len(tests), np.int64)
    losses, tables = np.zeros(len(tests), np.float64), list[Counts]()
    for batch, indices in scoring_batches(tests, pad_id, token_budget, device):
        alive = torch.tensor([len(own) > 0 for own in indices], device=batch.valid.device)
        counted = batch.valid & alive.unsqueeze(1)
        scores = logits(batch)
        k, b, classes = scores.shape
        each = functional.cross_entropy(scores.reshape(k * b, classes), batch.labels.reshape(k * b), reduction="none")
        answers = scores.argmax(-1)
        hits = (answers == batch.labels) & counted
        if confusion:
            cells = (batch.labels * classes + answers).masked_fill(~counted, classes**2)
            found = torch.stack([torch.bincount(own, minlength=classes**2 + 1) for own in cells])[:, :-1]
            tables.append(found.view(k, classes, classes).cpu().numpy())
        correct += hits.sum(1).cpu().numpy()
        losses += (each.view(k, b).double() * counted).sum(1).cpu().numpy()
        count += counted.sum(1).cpu().numpy()
    whole = list(np.sum(tables, axis=0)) if confusion else [None] * len(tests)
    return list(map(Score, correct.tolist(), losses.tolist(), count.tolist(), whole))
