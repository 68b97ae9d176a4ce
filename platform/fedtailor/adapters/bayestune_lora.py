"""BayesTune-LoRA (FedP2EFT section 3.2): LoRA with a trainable scale lambda for every rank of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams

LAMBDA = "lambda"


@dataclass(frozen=True)
class BayesTuneLora:
    """A, B and lambda (L, r_init), all EPHEMERAL; lambda is plugged in anew before each forward pass.

    Args:
        r_init: rank before pruning, r_mul * largest budget.
        scale: s.
    """

    r_init: int
    scale: float = 2.0
    lanes: bool = True
    trains_base: ClassVar[bool] = False

    @property
    def _lora(self) -> LoraAdapter:
        return LoraAdapter(self.r_init, self.scale, Scope.EPHEMERAL)

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """LoRA's parameters, then lambda."""
        return [*self._lora.specs(net), ParamSpec(LAMBDA, (len(net.adapted), self.r_init), Scope.EPHEMERAL)]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """LoRA's start; lambda is set by the local update."""
        return self._lora.initial(net, seed)

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs A and B in; see `use_lambda`."""
        self._lora.bind(net, params)


def use_lambda(net: LaneNet, lam: Tensor) -> None:
    """Lets the layers scale their ranks by ``lam`` (k, L, r) in the next forward pass."""
    # One unbind instead of L slices: each slice would write a full-size gradient.
    for layer, part in zip(net.layers, lam.unbind(1), strict=True):
        layer.lam = part


def column_norms(net: LaneNet, params: LaneParams, lanes: int) -> Tensor:
    """L1 norms of B's columns, (lanes, L, r): ``||B_{l,i}||_1`` of FedP2EFT Eq. 4."""
    return torch.stack([params[f"lora_B.{adapted.name}"][:lanes].abs().sum(1) for adapted in net.adapted], dim=1)
