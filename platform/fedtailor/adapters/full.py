"""Full fine-tuning: every weight of the model is trained, or all but its embeddings; one client at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams


def plain_name(name: str) -> str:
    """Module path without the wrapper that `LaneLinear` or `LaneEmbedding` puts around a layer."""
    return name.replace(".base.weight", ".weight").replace(".base.bias", ".bias")


@dataclass(frozen=True)
class FullModel:
    """All parameters of the model, or all but its embedding tables. Keeps the model's own dropout while training.

    Args:
        private: parts of names; weights with such a part stay with the client (PRIVATE), the others are SHARED.
        embeddings: whether embedding tables are trained, and an output embedding tied to one.
    """

    private: tuple[str, ...] = ()
    embeddings: bool = True
    lanes: bool = False
    trains_base: ClassVar[bool] = True
    r_init: ClassVar[int] = 0

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Every trained parameter once, tied ones under their first name."""
        named = ((plain_name(name), tuple(p.shape)) for name, p in self._trained(net))
        return [ParamSpec(name, shape, self._scope(name)) for name, shape in named]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """The weights as loaded."""
        return {plain_name(n): p.detach().clone() for n, p in self._trained(net)}

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Lets the model's parameters live in lane 0 of the flat buffers."""
        for name, parameter in self._trained(net):
            leaf = params[plain_name(name)]
            assert leaf.grad is not None
            parameter.requires_grad_(True)
            parameter.data, parameter.grad = leaf.detach()[0], leaf.grad[0]

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """Puts trained values into a plain model's weights, in place."""
        weights = dict(model.named_parameters())
        for name, value in tensors.items():
            weights[name].copy_(torch.from_numpy(value))

    def _trained(self, net: LaneNet) -> list[tuple[str, nn.Parameter]]:
        tables = [m.weight for m in net.model.modules() if isinstance(m, nn.Embedding)] if not self.embeddings else []
        return [(name, p) for name, p in net.model.named_parameters() if not any(p is table for table in tables)]

    def _scope(self, name: str) -> Scope:
        return Scope.PRIVATE if any(part in name for part in self.private) else Scope.SHARED
