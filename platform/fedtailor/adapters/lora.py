"""LoRA (Hu et al., 2022): W + s B A on every adapted layer, a lane axis in front."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtailor.core.lanes import LaneParams
from fedtailor.core.net import LaneNet, Site
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.seeding import torch_rng


def initial_a(site: Site, rank: int, seed: int) -> Tensor:
    """A before training, (rank, d_in) float32: Kaiming-uniform with a = sqrt(5), i.e. U(-1/sqrt(d_in), 1/sqrt(d_in)).

    The stream is named by (seed, layer) only: every client, round and method starts from the same A, as in the
    FedP2EFT reference, which seeds torch right before it attaches adapters.
    """
    bound = 1 / math.sqrt(site.d_in)
    draws = torch.rand(rank, site.d_in, generator=torch_rng(seed, "lora_A", site.name))
    return draws.mul_(2 * bound).sub_(bound)


@dataclass(frozen=True)
class LoraAdapter:
    """A (r, d_in) random, B (d_out, r) zero on each of the L layers; output scaled by ``scale``.

    Args:
        rank: r.
        scale: s = alpha / r; FedP2EFT uses alpha = 2 r, so s = 2.
        scope: SHARED when trained federatedly, EPHEMERAL when only personalised.
        draw_rank: rows of A that are drawn; the first r are used, so that A does not depend on the rank.
    """

    rank: int
    scale: float = 2.0
    scope: Scope = Scope.EPHEMERAL
    draw_rank: int | None = None
    lanes: bool = True

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """A then B of each layer, in module order."""
        return [
            spec
            for site in net.sites
            for spec in (
                ParamSpec(f"lora_A.{site.name}", (self.rank, site.d_in), self.scope),
                ParamSpec(f"lora_B.{site.name}", (site.d_out, self.rank), self.scope),
            )
        ]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Seeded A; B stays zero, so the adapted model is the base model."""
        rows = max(self.draw_rank or 0, self.rank)
        return {f"lora_A.{site.name}": initial_a(site, rows, seed)[: self.rank] for site in net.sites}

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs A and B into the layers, lambda = 1."""
        for site, layer in zip(net.sites, net.layers, strict=True):
            layer.bind(params[f"lora_A.{site.name}"], params[f"lora_B.{site.name}"], None, self.scale)


def lora_names(net: LaneNet) -> tuple[str, ...]:
    """Names of all A and B."""
    return tuple(f"lora_{matrix}.{site.name}" for site in net.sites for matrix in "AB")
