"""From lambda to ranks: the r L largest entries over all layers at once (FedP2EFT section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedtailor.adapters.selected_lora import RankSelection

TieRule = Literal["rank_then_layer", "layer_then_rank"]
RANK_BITS = 10
"""Mantissa bits of lambda that a ranking looks at: differences below 0.1 % are ties. Ranks of one layer often move
in lockstep (Adam equalises their steps), so finer differences are rounding noise, other on every machine and in
every grouping. The reference ranks bfloat16 values, 8 bits. The leading bit counts: a float32 has 24, a float64 53."""


def resolved(lam: Tensor, bits: int = RANK_BITS) -> Tensor:
    """``lam`` rounded to ``bits`` mantissa bits, in its own type.

    >>> resolved(torch.tensor([1.0001, 1.0004, -0.5]), 10).tolist()
    [1.0, 1.0, -0.5]
    """
    mantissa, exponent = torch.frexp(lam)
    return torch.ldexp((mantissa * 2.0**bits).round() / 2.0**bits, exponent)


def prune(
    lam: Tensor, budgets: Sequence[int], ties: TieRule = "rank_then_layer", bits: int = RANK_BITS
) -> RankSelection:
    """Keeps exactly ``budget * L`` entries of every lane.

    Values equal at the resolution of ``bits`` are taken by (rank index, layer index): an uninformative,
    all-equal lambda then keeps ranks 0 .. r-1 of every layer, which is plain LoRA. By (layer, rank) it would
    give the first layers everything.

    Args:
        lam: (K, L, r_init).
        budgets: r of each lane, (K,).
        ties: order among equal values.
        bits: see `RANK_BITS`; 24 compares float32 exactly, 53 float64.

    Returns:
        Kept entries with their lambda; dropped ones are zero.

    Raises:
        ValueError: a budget above r_init.
    """
    lanes, layers, r_init = lam.shape
    if max(budgets) > r_init:
        raise ValueError(f"budget {max(budgets)} is above r_init = {r_init}")
    by_rank = ties == "rank_then_layer"
    key = resolved(lam, bits)
    flat = (key.transpose(1, 2) if by_rank else key).reshape(lanes, -1)
    order = torch.argsort(flat, dim=1, descending=True, stable=True)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    for lane, budget in enumerate(budgets):
        keep[lane, order[lane, : budget * layers]] = True
    keep = keep.view(lanes, r_init, layers).transpose(1, 2) if by_rank else keep.view(lanes, layers, r_init)
    return RankSelection((lam * keep).contiguous(), keep.contiguous())


def tied_share(lam: Tensor, selection: RankSelection, bits: int = RANK_BITS) -> Tensor:
    """Share of entries that tie with the smallest kept one, (K,): 1 means that the ranking says nothing."""
    key = resolved(lam, bits)
    threshold = key.masked_fill(~selection.keep, torch.inf).flatten(1).amin(1)
    return (key.flatten(1) == threshold.unsqueeze(1)).to(lam.dtype).mean(1)
