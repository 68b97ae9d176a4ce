"""A linear layer with one low-rank adapter per lane beside its frozen weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class LaneState:
    """What all `LaneLinear` layers of a model need to know about the batch under way."""

    shapes: tuple[tuple[int, int], ...] = ()
    """Per running lane its own (rows, tokens)."""
    dropout: float = 0.0
    generators: list[torch.Generator] = field(default_factory=list)
    """One per lane, so that a lane draws the same mask whoever runs beside it."""
    training: bool = False
    bypass: bool = False
    """True while the base alone is wanted, adapters staying bound."""


class LaneLinear(nn.Module):
    r"""Computes :math:`W x + c + s \, B_k (\lambda_k \circ A_k\, \mathrm{dropout}(x))` for the lane k of each row.

    FedP2EFT section 3.2 (B lambda A); with lambda = 1 it is LoRA (Hu et al., 2022). Without a bound adapter it is
    the frozen layer itself.

    Args:
        base: frozen layer (d_in -> d_out).
        name: its module path.
        state: shared by all layers of the model.
    """

    def __init__(self, base: nn.Linear, name: str, state: LaneState) -> None:
        super().__init__()
        self.base, self.name, self.state = base, name, state
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.lam: Tensor | None = None
        self.scale = 1.0

    def bind(self, a: Tensor, b: Tensor, lam: Tensor | None, scale: float) -> None:
        """Attaches A (K, r, d_in), B (K, d_out, r) and lambda (K, r), or None for all ones."""
        self.a, self.b, self.lam, self.scale = a, b, lam, scale

    def unbind(self) -> None:
        """Back to the frozen layer."""
        self.a = self.b = self.lam = None

    def forward(self, x: Tensor) -> Tensor:
        """X (k*b, ..., d_in), lanes outermost, to (k*b, ..., d_out)."""
        y: Tensor = self.base(x)
        lanes = len(self.state.shapes)
        if self.a is None or self.b is None or self.state.bypass:
            if not self.state.bypass:
                # A bare layer draws too: which layers are bare depends on the other lanes' ranks.
                self._dropout(x, lanes)
            return y
        a, b, lam = (t if t is None or t.shape[0] == lanes else t[:lanes] for t in (self.a, self.b, self.lam))
        assert a is not None
        assert b is not None
        h = self._dropout(x, lanes).reshape(lanes, -1, x.shape[-1])
        z = torch.bmm(h, a.transpose(1, 2))
        if lam is not None:
            z = z * lam.unsqueeze(1).to(z.dtype)
        delta = torch.baddbmm(y.reshape(lanes, -1, y.shape[-1]), z, b.transpose(1, 2).to(z.dtype), alpha=self.scale)
        return delta.view(y.shape)

    def _dropout(self, x: Tensor, lanes: int) -> Tensor:
        p = self.state.dropout
        if not p or not self.state.training:
            return x
        # Each lane draws in its own shape: what is drawn must not depend on the group's padding.
        keep = torch.ones(lanes, x.shape[0] // lanes, *x.shape[1:], device=x.device, dtype=x.dtype)
        for lane, (rows, tokens) in enumerate(self.state.shapes):
            own = (rows, tokens, x.shape[-1]) if x.dim() == 3 else (rows, x.shape[-1])
            mask = torch.rand(own, generator=self.state.generators[lane]) >= p
            where = (lane, slice(rows), slice(tokens)) if x.dim() == 3 else (lane, slice(rows))
            keep[where] = mask.to(x) / (1 - p)
        return x * keep.view(x.shape)


def attach(model: nn.Module, linears: Sequence[tuple[str, nn.Linear]], state: LaneState) -> list[LaneLinear]:
    """Replaces the given layers of ``model`` by `LaneLinear` wrappers, in place and in order."""
    wrapped = []
    for name, linear in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = LaneLinear(linear, name, state)
        setattr(parent, name.rpartition(".")[2], layer)
        wrapped.append(layer)
    return wrapped
