r"""Regressions: the loss on test rows, and what W of a client's model is beside the W* that made its rows.

W is read off a model of any method: it is what the model answers to the unit vectors. Its rank is PF2LoRA's (section
5), the smallest j with the first j singular values at least 0.9 of the sum of all. That rule depends on the spectrum,
so two other ranks stand beside it: how many singular values are above rounding, and exp of the entropy of their shares
(Roy and Vetterli, "The effective rank", EUSIPCO 2007).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedtailor.lanes.batches import Examples, LaneBatch, make_batch
from fedtailor.lanes.net import LaneNet

Matrix = npt.NDArray[np.float64]
SHARE = 0.9
_ROUNDING = 1e-5


class Value(NamedTuple):
    """A number, and the examples behind it."""

    value: float
    weight: float


def rank90(matrix: Matrix) -> int:
    """The smallest j with the j largest singular values at least `SHARE` of the sum; 0 of a matrix that is zero.

    >>> rank90(np.diag([5.0, 4.0, 1.0])), rank90(np.diag([5.0, 4.0, 1.1])), rank90(np.zeros((3, 3)))
    (2, 3, 0)
    """
    shares = np.cumsum(np.linalg.svd(matrix, compute_uv=False))
    return int(np.searchsorted(shares, SHARE * shares[-1] * (1 - 1e-12)) + 1) if shares[-1] else 0


def numerical_rank(matrix: Matrix) -> int:
    """How many singular values are above rounding in float32, beside the largest."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return int((values > _ROUNDING * values[0]).sum())


def entropy_rank(matrix: Matrix) -> float:
    """Exp of the entropy of the singular values' shares; 0 of a matrix that is zero.

    >>> round(entropy_rank(np.eye(3)), 6)
    3.0
    """
    values = np.linalg.svd(matrix, compute_uv=False)
    if not values.sum():
        return 0.0
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


@torch.no_grad()
def fits(
    net: LaneNet,
    logits: Callable[[LaneBatch], Tensor],
    rows: Sequence[Examples],
    pad_id: int,
    truth: Sequence[Any],
) -> list[dict[str, Value]]:
    """Measures every lane's model.

    Args:
        net: the model, whose ``wanted`` is compared with.
        logits: (k, b, outputs) of a batch over the lanes.
        rows: of each lane, in lane order.
        pad_id: padding token.
        truth: W* of each lane, (inputs, outputs).

    Returns:
        ``loss``, the mean squared error of a row, summed over outputs; ``target_loss``, that of W*, i.e. the noise in
        these rows; ``distance`` :math:`|W - W^*|_F`; ``rank90``, ``rank_numerical`` and ``rank_entropy`` of W;
        ``target_rank90`` of W*.
    """
    assert net.wanted is not None
    batch = make_batch(rows, [np.arange(len(part.labels)) for part in rows], pad_id, net.device)
    wanted = net.wanted(batch.input_ids[..., 0]).double()
    inputs = net.model.get_input_embeddings()(batch.input_ids[..., 0]).double()  # type: ignore[operator]
    stars = torch.tensor(np.asarray(truth), dtype=torch.float64, device=net.device)
    losses, noise = (
        functional.mse_loss(found, wanted, reduction="none").sum(-1)
        for found in (logits(batch).double(), inputs @ stars)
    )
    count = batch.valid.sum(1).cpu().numpy()
    means = [((each * batch.valid).sum(1) / batch.valid.sum(1)).tolist() for each in (losses, noise)]
    return [
        {
            name: Value(float(value), float(count[k]))
            for name, value in {
                "loss": means[0][k],
                "target_loss": means[1][k],
                "distance": np.linalg.norm(w - star),
                "rank90": rank90(w),
                "rank_numerical": numerical_rank(w),
                "rank_entropy": entropy_rank(w),
                "target_rank90": rank90(star),
            }.items()
        }
        for k, (w, star) in enumerate(zip(_matrices(net, logits, len(rows), pad_id), stars.cpu().numpy(), strict=True))
    ]


def _matrices(net: LaneNet, logits: Callable[[LaneBatch], Tensor], lanes: int, pad_id: int) -> Matrix:
    """W of every lane, (lanes, inputs, outputs)."""
    tokens: range = net.config.unit_tokens
    ids, ones = np.array(tokens, dtype=np.int64)[:, None], np.ones(len(tokens), dtype=np.int64)
    units = Examples(ids, ones, np.zeros_like(ones))
    batch = make_batch([units] * lanes, [np.arange(len(tokens))] * lanes, pad_id, net.device)
    found: Matrix = logits(batch).double().cpu().numpy()
    return found
