"""LoRA (Hu et al., 2022): W + s B A on every adapted layer, a lane axis in front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedtailor.adapters.peft_export import export_adapter
from fedtailor.adapters.start import Start, started
from fedtailor.core.errors import ModelError
from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.lanes.layers import AdaptedLayer, Branch, LaneLinear
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.models.families import endings, ends

Targets = Literal["all-linear", "body", "head"] | tuple[str, ...]
"""Which of the adapted layers: all, those of the pretrained body, those of the classification head above it, or endings
of module paths."""


def chosen_layers(net: LaneNet, targets: Targets) -> list[tuple[AdaptedLayer, LaneLinear]]:
    """Adapted layers that ``targets`` names, in module order.

    Raises:
        ModelError: a target that no layer has; ``head`` of a model whose head carries no adapter (language models).
    """
    pairs = list(zip(net.adapted, net.layers, strict=True))
    if targets == "all-linear":
        return pairs
    if targets in ("body", "head"):
        chosen = [pair for pair in pairs if (pair[0].name in net.heads) == (targets == "head")]
        if not chosen:
            raise ModelError(f"no adapted layer belongs to the {targets}; this model has {endings(net.modules)}")
        return chosen
    missing = [t for t in targets if not any(ends(adapted.name, t) for adapted in net.adapted)]
    if missing:
        raise ModelError(f"no adapted layer ends in {missing}; this model has {endings(net.modules)}")
    return [pair for pair in pairs if any(ends(pair[0].name, t) for t in targets)]


@dataclass(frozen=True)
class LoraAdapter:
    """A (r, d_in) random, B (d_out, r) zero on each of the L layers; output scaled by ``scale``.

    Args:
        rank: r.
        scale: s = alpha / r; FedP2EFT uses alpha = 2 r, so s = 2.
        scope: SHARED when trained federatedly, PRIVATE when kept by its client, EPHEMERAL when only personalised. It
            decides what leaves a client, so there is no default.
        draw_rank: rows of A that are drawn; the first r are used, so that A does not depend on the rank.
        targets: layers that get one.
        head: whether the classification head's own weights are trained too (peft's SEQ_CLS).
        prefix: of the parameters' names.
        first_row: draws of A that another adapter has: with its rank both together start as one of both ranks.
        head_scope: of the head's own weights; None: ``scope``.
        start: how A and B are drawn.
    """

    rank: int
    scale: float
    scope: Scope
    draw_rank: int | None = None
    targets: Targets = "all-linear"
    head: bool = False
    prefix: str = "lora"
    first_row: int = 0
    head_scope: Scope | None = None
    start: Start = "lora"
    lanes: bool = True
    trains_base: ClassVar[bool] = False
    r_init: ClassVar[int] = 0

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """A then B of each layer, in module order; then the head's weights and biases."""
        low_rank = [
            spec
            for adapted, _ in chosen_layers(net, self.targets)
            for spec in (
                ParamSpec(f"{self.prefix}_A.{adapted.name}", (self.rank, adapted.d_in), self.scope),
                ParamSpec(f"{self.prefix}_B.{adapted.name}", (adapted.d_out, self.rank), self.scope),
            )
        ]
        return low_rank + self.head_specs(net)

    def head_specs(self, net: LaneNet) -> list[ParamSpec]:
        """The head's own weights and biases, where they are trained."""
        return [
            ParamSpec(f"{name}.{part}", tuple(value.shape), self.head_scope or self.scope)
            for name, layer in self._heads(net)
            for part, value in layer.base.named_parameters()
        ]

    def names(self, net: LaneNet) -> tuple[str, ...]:
        """Names of its parameters, in the order of ``specs``."""
        return tuple(spec.name for spec in self.specs(net))

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Seeded A; B stays zero and the head as it is, so the adapted model is the base model."""
        last, values = self.first_row + self.rank, dict[str, Tensor]()
        rows = max(self.draw_rank or 0, last)
        for x in self.layers_of(net):
            a, b = started(x, self.first_row, last, seed, self.start, rows)
            values |= {f"{self.prefix}_A.{x.name}": a} | ({} if b is None else {f"{self.prefix}_B.{x.name}": b})
        for name, layer in self._heads(net):
            values |= {f"{name}.{part}": value.detach() for part, value in layer.base.named_parameters()}
        return values

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs A and B into the layers, lambda = 1, and the head's weights into the head."""
        for adapted, layer in chosen_layers(net, self.targets):
            layer.bind(
                params[f"{self.prefix}_A.{adapted.name}"], params[f"{self.prefix}_B.{adapted.name}"], None, self.scale
            )
        self.bind_head(net, params)

    def bind_head(self, net: LaneNet, params: LaneParams) -> None:
        """Plugs the head's weights into the head, where they are trained."""
        for name, layer in self._heads(net):
            layer.bind_own(*(params[f"{name}.{part}"] for part, _ in layer.base.named_parameters()))

    def bind_frozen(self, net: LaneNet, params: LaneParams) -> None:
        """Without gradients: A and B under whatever is bound to the layers, the head's weights into the head."""
        for adapted, layer in chosen_layers(net, self.targets):
            layer.under = self.branch(adapted, params)
        for name, layer in self._heads(net):
            layer.bind_own(*(params[f"{name}.{part}"].detach() for part, _ in layer.base.named_parameters()))

    def branch(self, adapted: AdaptedLayer, params: LaneParams) -> Branch:
        """The layer's A and B as a branch without gradients."""
        a, b = params[f"{self.prefix}_A.{adapted.name}"], params[f"{self.prefix}_B.{adapted.name}"]
        return Branch(a.detach(), b.detach(), self.scale)

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """Adds s B A to plain weights and replaces the head's, in place and in float32.

        Args:
            model: unwrapped.
            tensors: values of this adapter's parameters.
        """
        weights = dict(model.named_parameters())
        down, up = f"{self.prefix}_A.", f"{self.prefix}_B."
        # The head's weights first: its LoRA, if it has one, belongs on top of them.
        for name, value in tensors.items():
            if not name.startswith((down, up)):
                weights[name].copy_(torch.from_numpy(value))
        for name, value in tensors.items():
            if name.startswith(down):
                module = name.removeprefix(down)
                added = self.scale * torch.from_numpy(tensors[f"{up}{module}"]) @ torch.from_numpy(value)
                transposed = isinstance(model.get_submodule(module), Conv1D)
                weights[f"{module}.weight"].add_(added.T if transposed else added)

    def export(
        self, net: LaneNet, params: LaneParams, clients: Sequence[str], lane: int, base_ref: str
    ) -> dict[str, bytes]:
        """Files of one lane as a peft folder, name to content; ``partial`` makes it an export of `Personalised`.

        Args:
            net: the model that the adapter belongs to.
            params: its lanes' parameters.
            clients: client id of each lane, for messages.
            lane: which one is exported.
            base_ref: where the base model is, as peft gets it.

        Raises:
            ModelError: a value is not finite.
        """
        return export_stacked([self], net, params, clients, lane, base_ref)

    def own_head(self, net: LaneNet, params: LaneParams, lane: int) -> dict[str, Tensor]:
        """A lane's head as plain weights, by full name; empty where the head is not trained."""
        return {
            f"{name}.{part}": params[f"{name}.{part}"][lane].detach()
            for name, layer in self._heads(net)
            for part, _ in layer.base.named_parameters()
        }

    def layers_of(self, net: LaneNet) -> list[AdaptedLayer]:
        """The layers that get A and B."""
        return [adapted for adapted, _ in chosen_layers(net, self.targets)]

    def _heads(self, net: LaneNet) -> list[tuple[str, LaneLinear]]:
        layers = zip(net.modules, net.layers, strict=True)
        return [(name, layer) for name, layer in layers if self.head and name in net.heads]


def lora_names(net: LaneNet) -> tuple[str, ...]:
    """Names of all A and B."""
    return tuple(f"lora_{matrix}.{adapted.name}" for adapted in net.adapted for matrix in "AB")


def export_stacked(
    parts: Sequence[LoraAdapter], net: LaneNet, params: LaneParams, clients: Sequence[str], lane: int, base_ref: str
) -> dict[str, bytes]:
    """The sum of adapters of one scale as one peft folder: A one above the other, B side by side, ranks added up.

    Args and errors are those of `LoraAdapter.export`. A trained head is written as a whole (peft's
    ``modules_to_save``), with its LoRA in it where it has one.
    """
    layers = [adapted for adapted in net.adapted if any(adapted in part.layers_of(net) for part in parts)]
    a, b = ({x.name: _stacked(parts, net, params, lane, matrix, x) for x in layers} for matrix in "AB")
    head = {name: value for part in parts for name, value in part.own_head(net, params, lane).items()}
    for x in layers:
        if f"{x.name}.weight" in head:
            head[f"{x.name}.weight"] = head[f"{x.name}.weight"] + parts[0].scale * b[x.name] @ a[x.name]
    left = [x for x in layers if f"{x.name}.weight" not in head]
    lam = {x.name: torch.ones(len(a[x.name])) for x in left}
    return export_adapter(left, a, b, lam, parts[0].scale, base_ref, clients[lane], head)


def _stacked(
    parts: Sequence[LoraAdapter], net: LaneNet, params: LaneParams, lane: int, matrix: str, adapted: AdaptedLayer
) -> Tensor:
    """A (sum of ranks, d_in) or B (d_out, sum of ranks) of one lane and layer."""
    found = [params[f"{part.prefix}_{matrix}.{adapted.name}"][lane] for part in parts if adapted in part.layers_of(net)]
    return torch.cat(found, 0 if matrix == "A" else 1).detach()


@dataclass(frozen=True)
class AdapterPair:
    """Two LoRA adapters in one model, one that is shared, say, and one that stays with the client.

    The parameters of both; the model computes with the first, with the second, or with their sum, in which the second
    alone is trained ("both") or the first, too ("joint").

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

    def switch(self, net: LaneNet, params: LaneParams, to: Literal["first", "second", "both", "joint"]) -> None:
        """Takes off what is bound, and binds one of the two or, as `bind` does, both."""
        net.unbind()
        if to == "joint":
            self._bind_joint(net, params)
            return
        adapters: Mapping[str, LoraAdapter | AdapterPair] = {"first": self.first, "second": self.second, "both": self}
        adapters[to].bind(net, params)

    def _bind_joint(self, net: LaneNet, params: LaneParams) -> None:
        """The sum of both, with gradients and one dropout mask for both."""
        for adapted, layer in chosen_layers(net, self.first.targets):
            a, b = (params[f"{self.first.prefix}_{matrix}.{adapted.name}"] for matrix in "AB")
            layer.under = Branch(a, b, self.first.scale, dropout=True)
            layer.draws = True
        self.first.bind_head(net, params)
        self.second.bind(net, params)

    @property
    def head(self) -> bool:
        """Whether the classification head's own weights are trained."""
        return self.first.head or self.second.head

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """The first's values as plain weights; see `LoraAdapter.merge`."""
        self.first.merge(model, tensors)
