"""LoRA with frozen rank-wise scales and another set of ranks in every layer and lane (FedP2EFT section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtailor.adapters.start import initial_a
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams


@dataclass(frozen=True)
class RankSelection:
    """Which ranks each lane keeps, and at which scale.

    Args:
        lam: lambda with pruned entries zero, (K, L, r_init).
        keep: which entries are kept, (K, L, r_init) bool. A kept lambda may be negative (raw reference
            values) but a dropped one is always zero.
    """

    lam: Tensor
    keep: Tensor

    @property
    def ranks(self) -> Tensor:
        """Ranks kept, (K, L) int64."""
        return self.keep.sum(-1)

    def expand(self, index: Sequence[int]) -> RankSelection:
        """Lanes picked by index, possibly repeated."""
        return RankSelection(self.lam[list(index)], self.keep[list(index)])


def uniform_selection(budgets: Sequence[int], layers: int, r_init: int, like: Tensor) -> RankSelection:
    """Plain LoRA: lane k keeps the first ``budgets[k]`` ranks of every layer with lambda = 1."""
    first = torch.arange(r_init) < torch.tensor(budgets).unsqueeze(1)
    keep = first.unsqueeze(1).expand(len(budgets), layers, r_init).to(like.device)
    return RankSelection(keep.to(like.dtype), keep)


class SelectedLora:
    """A and B of the kept ranks only, padded per layer to the widest lane; lambda is frozen.

    Kept ranks use their own rows of the seeded A ("re-initialised" in the paper means the same draw again), B is zero.

    Args:
        selection: kept ranks of K lanes.
        scale: s; not rescaled after pruning.
    """

    lanes = True
    trains_base: ClassVar[bool] = False
    r_init: ClassVar[int] = 0

    def __init__(self, selection: RankSelection, scale: float) -> None:
        self.selection, self.scale = selection, scale
        self.width = [max(1, int(r)) for r in selection.ranks.amax(0)]
        # Kept rows first, in rank order; a stable sort keeps that order.
        self.order = torch.argsort((~selection.keep).to(torch.int8), dim=-1, stable=True)

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """A then B of each layer."""
        return [
            spec
            for adapted, width in zip(net.adapted, self.width, strict=True)
            for spec in (
                ParamSpec(f"lora_A.{adapted.name}", (width, adapted.d_in), Scope.EPHEMERAL),
                ParamSpec(f"lora_B.{adapted.name}", (adapted.d_out, width), Scope.EPHEMERAL),
            )
        ]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Kept rows of the seeded A, (K, width, d_in); padding rows are zero."""
        values = {}
        r_init = self.selection.keep.shape[-1]
        for number, (adapted, width) in enumerate(zip(net.adapted, self.width, strict=True)):
            template = initial_a(adapted, r_init, seed).to(self.order.device)
            rows = template[self.order[:, number, :width]]
            kept = self.selection.keep[:, number].gather(-1, self.order[:, number, :width])
            values[f"lora_A.{adapted.name}"] = rows * kept.unsqueeze(-1)
        return values

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs A, B and the frozen lambda into the layers; a layer where no lane keeps a rank stays bare."""
        ranks = self.selection.ranks
        for number, (adapted, layer, width) in enumerate(zip(net.adapted, net.layers, self.width, strict=True)):
            if not bool(ranks[:, number].any()):
                layer.unbind()
                layer.draws = (
                    True  # which layers are bare depends on the other lanes' ranks, and what is drawn must not
                )
                continue
            lam = self.lambdas(number, width)
            layer.bind(params[f"lora_A.{adapted.name}"], params[f"lora_B.{adapted.name}"], lam, self.scale)

    def lambdas(self, number: int, width: int) -> Tensor:
        """Lambda of the kept ranks of a layer in parameter order, (K, width), zero where padded."""
        return self.selection.lam[:, number].gather(-1, self.order[:, number, :width]).contiguous()
