"""Two LoRA adapters in one model that can be switched: one that is shared, say, and one that stays with the client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams


@dataclass(frozen=True)
class AdapterPair:
    """The parameters of both; the model computes with the first, with the second, or with their sum.

    Args:
        first: its parameters come first.
        second: with another ``prefix``; its layers may be the same or others.
    """

    first: LoraAdapter
    second: LoraAdapter
    lanes: bool = True
    trains_base: ClassVar[bool] = False
    r_init: ClassVar[int] = 0

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Those of the first, then those of the second."""
        return [*self.first.specs(net), *self.second.specs(net)]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Seeded A, the same in both up to the smaller rank; B zero: the adapted model is the base model."""
        return {**self.first.initial(net, seed), **self.second.initial(net, seed)}

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """The sum of both; the first gets no gradients."""
        self.first.bind_frozen(net, params)
        self.second.bind(net, params)

    def switch(self, net: LaneNet, params: LaneParams, to: Literal["first", "second", "both"]) -> None:
        """Takes off what is bound, and binds one of the two or, as `bind` does, both."""
        net.unbind()
        adapters: Mapping[str, LoraAdapter | AdapterPair] = {"first": self.first, "second": self.second, "both": self}
        adapters[to].bind(net, params)

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """The first's values as plain weights; see `LoraAdapter.merge`."""
        self.first.merge(model, tensors)
