"""The resident base model, seen through lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from fedtailor.adapters.lane_embedding import LaneEmbedding
from fedtailor.adapters.lane_linear import LaneLinear, LaneState, attach
from fedtailor.core.batches import LaneBatch


@dataclass(frozen=True)
class Site:
    """An adapted linear layer: module path and widths."""

    name: str
    d_in: int
    d_out: int


class LaneNet:
    """A frozen classifier whose linear layers can carry one adapter per lane.

    Args:
        model: transformers sequence classifier in float32 (or float64 in identity tests).
        linears: the L layers to adapt, in module order.
        dtype: compute type; bfloat16 turns autocast on.
        base_dropout: dropout probability of the frozen base while adapters train.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[tuple[str, nn.Linear]],
        dtype: str = "float32",
        base_dropout: float = 0.0,
    ) -> None:
        self.model = model
        self.sites = tuple(Site(name, linear.in_features, linear.out_features) for name, linear in linears)
        self.state = LaneState()
        self.layers = attach(model, linears, self.state)
        self.base_dropout = base_dropout
        self.overlay_index: dict[str, int] = {}
        self._autocast = torch.bfloat16 if dtype == "bfloat16" else None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        self.own_dropout = [m.p for m in self._dropouts]
        model.eval()

    @property
    def device(self) -> torch.device:
        """Where the base weights are."""
        return next(self.model.parameters()).device

    @property
    def param_dtype(self) -> torch.dtype:
        """Type of the base weights."""
        return next(self.model.parameters()).dtype

    @property
    def modules(self) -> tuple[str, ...]:
        """Module paths of the L adapted layers."""
        return tuple(site.name for site in self.sites)

    @property
    def heads(self) -> tuple[str, ...]:
        """Adapted layers of the classification head, outside the pretrained body."""
        body = f"{self.model.base_model_prefix}."
        return tuple(site.name for site in self.sites if not site.name.startswith(body))

    def clear_overlay(self) -> None:
        """Back to the base that all clients share."""
        for module in self.model.modules():
            if isinstance(module, LaneLinear):
                module.overlay = None
            elif isinstance(module, LaneEmbedding):
                module.tables = None
        self.overlay_index, self.state.overlay_rows = {}, None

    def place(self, clients: Sequence[str]) -> None:
        """Says whose overlay each lane of the next batches has, in lane order; no-op without an overlay."""
        if self.overlay_index:
            rows = [self.overlay_index[client] for client in clients]
            self.state.overlay_rows = torch.tensor(rows, device=self.device)

    def unbind(self) -> None:
        """Removes all adapters: the model is the base again, with the clients' overlay where there is one."""
        for layer in self.layers:
            layer.unbind()
        self.state.generators, self.state.dropout, self.state.training = [], 0.0, False
        self.state.bypass = False

    def train_mode(self, on: bool, own_dropout: bool = False) -> None:
        """Switches adapter dropout and the base's dropout.

        Args:
            on: training or evaluating.
            own_dropout: use the model's configured probabilities (full fine-tuning) instead of ``base_dropout``.
        """
        self.state.training = on
        for module, own in zip(self._dropouts, self.own_dropout, strict=True):
            module.p = own if own_dropout else self.base_dropout
        # Attention reads its dropout module's p but its own training flag, so the whole model is switched; seldom,
        # since a walk over all modules costs as much as a training step of a small model.
        active = on and (own_dropout or self.base_dropout > 0)
        if self.model.training != active:
            self.model.train(active)
        self.state.bypass = False

    def logits(self, batch: LaneBatch) -> Tensor:
        """Class scores (k, b, C), float32 or the base's type if wider."""
        k, b, t = batch.input_ids.shape
        self.state.shapes, self.state.rows = batch.shapes, b
        segments = batch.token_type_ids if _takes_segments(self.model) else None
        device = self.device.type
        with torch.autocast(device, dtype=self._autocast) if self._autocast else nullcontext():
            out = self.model(
                input_ids=batch.input_ids.view(k * b, t),
                attention_mask=batch.attention_mask.view(k * b, t),
                **({} if segments is None else {"token_type_ids": segments.view(k * b, t)}),
            ).logits
        out = out.float() if out.dtype in (torch.bfloat16, torch.float16) else out
        result: Tensor = out.view(k, b, -1)
        return result


def _takes_segments(model: nn.Module) -> bool:
    """The model has embeddings for two segments."""
    types = getattr(getattr(model, "config", None), "type_vocab_size", 0)
    return isinstance(types, int) and types > 1 and "token_type_ids" in _arguments(type(model).forward)


@cache
def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(signature(forward).parameters)
