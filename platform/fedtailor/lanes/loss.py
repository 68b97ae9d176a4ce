"""Cross-entropy per lane."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fedtailor.lanes.batches import LaneBatch


def lane_cross_entropy(logits: Tensor, batch: LaneBatch) -> Tensor:
    """Mean cross-entropy of each lane over its own targets: texts, or response tokens.

    Args:
        logits: (k, m, C).
        batch: labels and valid targets (k, m).

    Returns:
        (k,).
    """
    k, b, classes = logits.shape
    each = functional.cross_entropy(logits.reshape(k * b, classes), batch.labels.reshape(k * b), reduction="none")
    weight = batch.valid.to(each.dtype)
    return (each.view(k, b) * weight).sum(1) / weight.sum(1)
