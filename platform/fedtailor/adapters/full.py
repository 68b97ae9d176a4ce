"""Full fine-tuning: every weight of the model is SHARED; one client at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fedtailor.core.lanes import LaneParams
from fedtailor.core.net import LaneNet
from fedtailor.core.scope import ParamSpec, Scope


def plain_name(name: str) -> str:
    """Module path without the wrapper that `LaneLinear` puts around a layer."""
    return name.replace(".base.weight", ".weight").replace(".base.bias", ".bias")


@dataclass(frozen=True)
class FullModel:
    """All parameters of the model. Keeps the model's own dropout while training."""

    lanes: bool = False

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Every parameter once, tied ones under their first name."""
        return [ParamSpec(plain_name(n), tuple(p.shape), Scope.SHARED) for n, p in net.model.named_parameters()]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """The weights as loaded."""
        return {plain_name(n): p.detach().clone() for n, p in net.model.named_parameters()}

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Lets the model's parameters live in lane 0 of the flat buffer."""
        for name, parameter in net.model.named_parameters():
            leaf = params[plain_name(name)]
            assert leaf.grad is not None
            parameter.requires_grad_(True)
            parameter.data, parameter.grad = leaf.detach()[0], leaf.grad[0]
