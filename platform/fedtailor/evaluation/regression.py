r"""Regressions: the loss on test rows, and what W of a client's model is beside the W* that made its rows.

W is read off a model of any method: it is what the model answers to the unit vectors. Its rank is PF2LoRA's rank90
(section 5), which depends on the spectrum, so two others stand beside it: the entropy rank (`adapters.spectrum`) and
how many singular values are above rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from fedtailor.adapters.spectrum import entropy_rank, of_product, rank90
from fedtailor.lanes.batches import Examples, LaneBatch, make_batch
from fedtailor.lanes.net import LaneNet

_ROUNDING = 1e-5
"""Of float32, beside the largest singular value."""


class Value(NamedTuple):
    """A number, and the examples behind it."""

    value: float
    weight: float


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
    found = _matrices(net, logits, len(rows), pad_id)
    # A model that diverged has no singular values: they are NaN then, and its loss says so.
    spectra = of_product(found, torch.eye(found.shape[-1]).to(found))
    numbers = {
        "loss": means[0],
        "target_loss": means[1],
        "distance": torch.linalg.matrix_norm(found - stars).tolist(),
        "rank90": rank90(spectra).tolist(),
        "rank_numerical": (spectra > _ROUNDING * spectra[:, :1]).sum(1).tolist(),
        "rank_entropy": entropy_rank(spectra).tolist(),
        "target_rank90": rank90(torch.linalg.svdvals(stars)).tolist(),
    }
    return [
        {name: Value(float(values[k]), float(count[k])) for name, values in numbers.items()} for k in range(len(rows))
    ]


def _matrices(net: LaneNet, logits: Callable[[LaneBatch], Tensor], lanes: int, pad_id: int) -> Tensor:
    """W of every lane, (lanes, inputs, outputs) float64."""
    tokens: range = net.config.unit_tokens
    ids, ones = np.array(tokens, dtype=np.int64)[:, None], np.ones(len(tokens), dtype=np.int64)
    units = Examples(ids, ones, np.zeros_like(ones))
    batch = make_batch([units] * lanes, [np.arange(len(tokens))] * lanes, pad_id, net.device)
    return logits(batch).double()
