"""From lambda to ranks: the r L largest entries over all layers at once (FedP2EFT section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedtailor.adapters.selected_lora import RankSelection

TieRule = Literal["rank_then_layer", "layer_then_rank"]


def prune(lam: Tensor, budgets: Sequence[int], ties: TieRule = "rank_then_layer") -> RankSelection:
    """Keeps exactly ``budget * L`` entries of every lane.

    Equal values are taken by (rank index, layer index): an uninformative, all-equal lambda then keeps ranks
    0 .. r-1 of every layer, which is plain LoRA. By (layer, rank) it would give the first layers everything.

    Args:
        lam: (K, L, r_init).
        budgets: r of each lane, (K,).
        ties: order among equal values.

    Returns:
        Kept entries with their lambda; dropped ones are zero.

    Raises:
        ValueError: a budget above r_init.
    """
    lanes, layers, r_init = lam.shape
    if max(budgets) > r_init:
        raise ValueError(f"budget {max(budgets)} is above r_init = {r_init}")
    by_rank = ties == "rank_then_layer"
    flat = (lam.transpose(1, 2) if by_rank else lam).reshape(lanes, -1)
    order = torch.argsort(flat, dim=1, descending=True, stable=True)
    keep = torch.zeros_like(flat, dtype=torch.bool)
    for lane, budget in enumerate(budgets):
        keep[lane, order[lane, : budget * layers]] = True
    keep = keep.view(lanes, r_init, layers).transpose(1, 2) if by_rank else keep.view(lanes, layers, r_init)
    return RankSelection((lam * keep).contiguous(), keep.contiguous())


def tied_share(lam: Tensor, selection: RankSelection) -> Tensor:
    """Share of entries that equal the smallest kept value, (K,): 1 means that the ranking says nothing."""
    threshold = lam.masked_fill(~selection.keep, torch.inf).flatten(1).amin(1)
    return (lam.flatten(1) == threshold.unsqueeze(1)).to(lam.dtype).mean(1)
