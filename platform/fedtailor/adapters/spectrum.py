r"""How many directions an adapter adds to a weight: singular values of its B A, and of a sum of several, per module.

With :math:`[B\;D] = Q_1 R_1` and :math:`[A;C]^T = Q_2 R_2` the singular values of :math:`B A + D C` are those of
:math:`R_1 R_2^T`, which is as small as the ranks: the product itself, (d_out, d_in), is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams

SHARE = 0.9
"""Of the sum of all singular values, what the first ones must make up (PF2LoRA, section 5)."""


@torch.no_grad()
def singular_values(parts: Sequence[LoraAdapter], net: LaneNet, params: LaneParams) -> dict[str, Tensor]:
    """Those of the sum of s B A over some adapters, of each lane and adapted module.

    Args:
        parts: adapters whose sum the model computes with.
        net: the model that they belong to.
        params: their values.

    Returns:
        module to (K, R) float64 on the CPU, descending, R the sum of the ranks; NaN where a value is not finite.
    """
    found = {}
    for layer in net.adapted:
        here = [part for part in parts if part.rank and layer in part.layers_of(net)]
        if here:
            ups = [part.scale * params[f"{part.prefix}_B.{layer.name}"].detach().cpu().double() for part in here]
            downs = [params[f"{part.prefix}_A.{layer.name}"].detach().cpu().double() for part in here]
            found[layer.name] = of_product(torch.cat(ups, 2), torch.cat(downs, 1))
    return found


def of_product(up: Tensor, down: Tensor) -> Tensor:
    """Singular values of ``up @ down`` from small factors, (..., R) descending; NaN where a factor is not finite.

    Args:
        up: (..., d_out, R).
        down: (..., R, d_in).

    >>> of_product(torch.tensor([[3.0, 0.0], [0.0, 0.0], [0.0, 2.0]]), torch.eye(2))
    tensor([3., 2.])
    """
    finite = torch.isfinite(up).flatten(-2).all(-1) & torch.isfinite(down).flatten(-2).all(-1)
    kept = finite[..., None, None]
    left, right = (torch.linalg.qr(torch.where(kept, part, 0.0), "r").R for part in (up, down.mT))
    return torch.where(finite[..., None], torch.linalg.svdvals(left @ right.mT), torch.nan)


def rank90(values: Tensor) -> Tensor:
    """Smallest j such that the j largest make up `SHARE` of the sum of all, (...) int64; 0 where all are 0.

    The rule depends on how the spectrum falls off: it is below the number of directions that are there wherever the
    last of them are small.

    Args:
        values: singular values, (..., R) descending.

    >>> rank90(torch.tensor([[4.0, 4.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]))
    tensor([3, 3, 0])
    >>> rank90(torch.tensor([8.0, 1.0, 1.0]))
    tensor(2)
    """
    total = values.double().sum(-1, keepdim=True)
    # A sum that is the share but for rounding counts as the share.
    missing = values.double().cumsum(-1) < SHARE * total * (1 - 1e-9)
    return missing.sum(-1) + (total.squeeze(-1) > 0).long()


def entropy_rank(values: Tensor) -> Tensor:
    """Exponential of the entropy of the values as shares of their sum, (...) float64; 0 where all are 0.

    Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007.

    Args:
        values: singular values, (..., R).

    >>> entropy_rank(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])).tolist()
    [2.0, 0.0]
    """
    total = values.double().sum(-1, keepdim=True)
    shares = values.double() / total.where(total > 0, torch.ones_like(total))
    found: Tensor = torch.special.entr(shares).sum(-1).exp() * (total.squeeze(-1) > 0)
    return found
