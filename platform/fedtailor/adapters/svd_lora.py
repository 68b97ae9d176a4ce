r"""AdaLoRA's adapter (Zhang et al., ICLR 2023, Eq. 3): :math:`W x + s \, P \Lambda Q x` on every adapted layer.

P is B here, Q is A and the diagonal of Lambda is E, as peft names them. `SvdLora` is what one lane trains; `SvdLanes`
is what remains of it, for several lanes side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.seeding import torch_rng
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams

INIT_SD = 0.02
"""peft's standard deviation of A and B before training."""


@dataclass(frozen=True)
class SvdLora:
    """A (r, d_in) and B (d_out, r) Gaussian, E (r,) zero, so that the adapted model is the base at first.

    Args:
        rank: r before any budget is applied, init_r in peft.
        scale: s.
        draw_rank: ranks that are drawn; the first ``rank`` are used, so that a rank's values do not depend on r.
    """

    rank: int
    scale: float
    draw_rank: int = 0
    lanes: bool = True
    trains_base: ClassVar[bool] = False
    r_init: ClassVar[int] = 0

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """A, E, B of each layer, in module order."""
        return [
            spec
            for adapted in net.adapted
            for spec in (
                ParamSpec(f"lora_A.{adapted.name}", (self.rank, adapted.d_in), Scope.EPHEMERAL),
                ParamSpec(f"lora_E.{adapted.name}", (self.rank,), Scope.EPHEMERAL),
                ParamSpec(f"lora_B.{adapted.name}", (adapted.d_out, self.rank), Scope.EPHEMERAL),
            )
        ]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Seeded A and B, equal for every client and budget."""
        values = {}
        drawn = max(self.draw_rank, self.rank)
        for adapted in net.adapted:
            stream = torch_rng(seed, "adalora", adapted.name)
            down, up = (torch.randn(drawn, width, generator=stream) for width in (adapted.d_in, adapted.d_out))
            values[f"lora_A.{adapted.name}"] = down[: self.rank] * INIT_SD
            values[f"lora_B.{adapted.name}"] = up[: self.rank].T * INIT_SD
        return values

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs A, E and B into the layers."""
        for adapted, layer in zip(net.adapted, net.layers, strict=True):
            a, e, b = (params[f"lora_{matrix}.{adapted.name}"] for matrix in "AEB")
            layer.bind(a, b, e, self.scale)


def svd_names(net: LaneNet) -> tuple[str, ...]:
    """Names of all A, E and B."""
    return tuple(f"lora_{matrix}.{adapted.name}" for adapted in net.adapted for matrix in "AEB")


def orthogonality(net: LaneNet, params: LaneParams) -> Tensor:
    r"""How far the singular vectors are from orthonormal, (K,).

    .. math:: \frac{1}{2L} \sum_l \|A_l A_l^T - I\|_F + \|B_l^T B_l - I\|_F

    AdaLoRA's Eq. 4 sums squared norms; its authors' code and peft take this mean, and gamma's grid is for it.
    """
    grams = []
    for adapted in net.adapted:
        a, b = params[f"lora_A.{adapted.name}"], params[f"lora_B.{adapted.name}"]
        grams += [torch.bmm(a, a.transpose(1, 2)), torch.bmm(b.transpose(1, 2), b)]
    stacked = torch.stack(grams)
    distance: Tensor = torch.linalg.vector_norm(stacked - torch.eye(stacked.shape[-1]).to(stacked), dim=(2, 3))
    return distance.mean(0)


@dataclass(frozen=True)
class TrainedSvd:
    """Kept ranks of one lane, layer by layer.

    Args:
        a: (k_l, d_in) each.
        e: (k_l,) each.
        b: (d_out, k_l) each.
        scale: s.
    """

    a: tuple[Tensor, ...]
    e: tuple[Tensor, ...]
    b: tuple[Tensor, ...]
    scale: float

    @classmethod
    def of(cls, net: LaneNet, params: LaneParams, keep: Tensor, scale: float) -> TrainedSvd:
        """Copies the ranks that ``keep`` (L, r) bool marks out of the only lane of ``params``."""
        found: dict[str, list[Tensor]] = {"A": [], "E": [], "B": []}
        for adapted, kept in zip(net.adapted, keep.to(net.device), strict=True):
            for matrix, values in found.items():
                own = params[f"lora_{matrix}.{adapted.name}"].detach()[0]
                values.append(own[:, kept] if matrix == "B" else own[kept])
        return cls(tuple(found["A"]), tuple(found["E"]), tuple(found["B"]), scale)

    @property
    def ranks(self) -> Tensor:
        """Ranks of each layer, (L,) int64."""
        return torch.tensor([len(e) for e in self.e])


@dataclass(frozen=True)
class SvdLanes:
    """Trained lanes side by side, padded with zeros to the widest of each layer; each lane's scale is in lambda."""

    trained: Sequence[TrainedSvd]
    lanes: bool = True
    trains_base: ClassVar[bool] = False
    r_init: ClassVar[int] = 0

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """None: nothing is trained any more."""
        return ()

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """None."""
        return {}

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs all lanes into the layers; a layer where no lane keeps a rank stays bare."""
        for number, (adapted, layer) in enumerate(zip(net.adapted, net.layers, strict=True)):
            lanes, width = len(self.trained), max(len(one.e[number]) for one in self.trained)
            if not width:
                layer.unbind()
                continue
            like = self.trained[0].a[number]
            a, lam = like.new_zeros(lanes, width, adapted.d_in), like.new_zeros(lanes, width)
            b = like.new_zeros(lanes, adapted.d_out, width)
            for lane, one in enumerate(self.trained):
                kept = len(one.e[number])
                a[lane, :kept], lam[lane, :kept] = one.a[number], one.e[number] * one.scale
                b[lane, :, :kept] = one.b[number]
            layer.bind(a, b, lam, 1.0)
