"""Layers with a lane axis: a frozen linear layer with one low-rank adapter per lane, an embedding table per client.

The tables are frozen: they are what DEPT's clients keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

Linear = nn.Linear | Conv1D
"""Layers that compute W x + c; a ``Conv1D`` keeps W transposed, (d_in, d_out)."""


class KeptLinear(nn.Linear):
    """A frozen linear layer that also keeps its weights in autocast's type, which would cast them at every call.

    Same numbers, for two more bytes per weight. Weights that are trained are cast as ever.
    """

    _kept: tuple[int, int, Tensor, Tensor | None] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """X (..., d_in) to (..., d_out)."""
        device = input.device.type
        if self.weight.requires_grad or not torch.is_autocast_enabled(device):
            return super().forward(input)
        return nn.functional.linear(input, *self.narrow(torch.get_autocast_dtype(device)))

    def narrow(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Weight and bias in a narrower type, cast when they are asked for first, or have changed since."""
        at = (self.weight.data_ptr(), self.weight._version)
        if self._kept is None or self._kept[:2] != at or self._kept[2].dtype != dtype:
            self._kept = (*at, self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return self._kept[2:]


def keep_narrow(model: nn.Module) -> None:
    """Makes the linear layers of a model `KeptLinear`, in place and under their names; other classes stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = KeptLinear


@dataclass
class LaneState:
    """What all lane-wise layers of a model need to know about the batch under way."""

    shapes: tuple[tuple[int, int], ...] = ()
    """Per running lane its own (rows, tokens)."""
    rows: int = 0
    """Rows of every lane, padding included."""
    first: int = 0
    """Bound adapter of the first running lane: above 0 where lanes run one by one."""
    fused: bool = True
    """Lanes may share a forward pass: every adapted layer sees their rows side by side, see `lanes.probe`."""
    dropout: float = 0.0
    generators: list[torch.Generator] = field(default_factory=list)
    """One per lane, so that a lane draws the same mask whoever runs beside it."""
    training: bool = False
    bypass: bool = False
    """True while the base alone is wanted, adapters staying bound."""
    overlay_rows: Tensor | None = None
    """Per lane the row of the bound overlay that belongs to its client, (K,) int64; None: no overlay."""
    blend: Tensor | None = None
    """Weight w of the bound adapter, and 1 - w of what is under it, (k, rows) or (1, 1) for all; None: both weigh 1."""

    def running(self, values: Tensor) -> Tensor:
        """Of values per bound lane (K, ...) those of the running ones."""
        lanes = len(self.shapes)
        return values if len(values) == lanes else values[self.first : self.first + lanes]


@dataclass(frozen=True)
class Branch:
    """A low-rank term s B (A x): A (K, r, d_in), B (K, d_out, r); ``dropout``: x as the adapter on top has it."""

    a: Tensor
    b: Tensor
    scale: float
    dropout: bool = False


@dataclass(frozen=True)
class AdaptedLayer:
    """An adapted linear layer: module path and widths.

    Args:
        name: module path.
        d_in: input width.
        d_out: output width.
        transposed: its weight is (d_in, d_out), what peft calls ``fan_in_fan_out``.
    """

    name: str
    d_in: int
    d_out: int
    transposed: bool = False

    @classmethod
    def of(cls, name: str, layer: Linear) -> AdaptedLayer:
        """Widths of a layer, whatever its weight looks like (quantised ones are packed)."""
        if isinstance(layer, Conv1D):
            return cls(name, layer.nx, layer.nf, transposed=True)
        return cls(name, layer.in_features, layer.out_features)


class LaneLinear(nn.Module):
    r"""Computes :math:`W x + c + s \, B_k (\lambda_k \circ A_k\, \mathrm{dropout}(x))` for the lane k of each row.

    FedP2EFT section 3.2 (B lambda A); with lambda = 1 it is LoRA (Hu et al., 2022). Without a bound adapter it is
    the frozen layer itself. Under the adapter there may be further low-rank branches that are not trained now, a
    branch that belongs to the client's base (the overlay), and a weight of its own for every lane.

    Args:
        base: frozen layer (d_in -> d_out).
        name: its module path.
        state: shared by all layers of the model.
    """

    def __init__(self, base: Linear, name: str, state: LaneState) -> None:
        super().__init__()
        self.base, self.name, self.state = base, name, state
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.lam: Tensor | None = None
        self.scale = 1.0
        self.draws = False
        """Whether the input goes through dropout, also where no adapter of these lanes reads it."""
        self.under: Branch | None = None
        self.overlay: Branch | None = None
        self.own: tuple[Tensor, Tensor | None] | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen layer's, for code that asks a layer for its type (T5)."""
        return self.base.weight

    def bind(self, a: Tensor, b: Tensor, lam: Tensor | None, scale: float) -> None:
        """Attaches A (K, r, d_in), B (K, d_out, r) and lambda (K, r), or None for all ones."""
        # Past Module.__setattr__, whose checks cost more than the rest of a round's bookkeeping.
        vars(self).update(a=a, b=b, lam=lam, scale=scale, draws=True)

    def bind_own(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Gives every lane a weight (K, d_out, d_in) and, if the layer has one, a bias (K, d_out) of its own."""
        self.own = (weight, bias)

    def unbind(self) -> None:
        """Back to the client's base: the frozen layer and, where one is bound, its overlay."""
        vars(self).update(a=None, b=None, lam=None, under=None, own=None, draws=False)

    def forward(self, x: Tensor) -> Tensor:
        """X (k*b, ..., d_in), lanes outermost, to (k*b, ..., d_out)."""
        lanes = len(self.state.shapes)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, and not for each of the products below
        y = self._base(x, lanes)
        if self.state.bypass:
            return y
        dropped, own = self._dropout(x, lanes) if self.draws else x, self.state.blend
        if self.under is not None:
            a, b = self.state.running(self.under.a), self.state.running(self.under.b)
            rest = None if own is None else 1 - own
            y = _low_rank(y, dropped if self.under.dropout else x, a, b, None, self.under.scale, rest)
        if self.a is None or self.b is None:
            return y
        lam = None if self.lam is None else self.state.running(self.lam)
        a, b = self.state.running(self.a), self.state.running(self.b)
        return _low_rank(y, dropped, a, b, lam, self.scale, own)

    def _base(self, x: Tensor, lanes: int) -> Tensor:
        y: Tensor
        if self.own is not None and not self.state.bypass:
            weight, bias = self.own
            h, w = x.reshape(lanes, -1, x.shape[-1]), self.state.running(weight).transpose(1, 2)
            y = torch.bmm(h, w) if bias is None else torch.baddbmm(self.state.running(bias).unsqueeze(1), h, w)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = self.base(x)
        if self.overlay is not None and self.state.overlay_rows is not None:
            rows = self.state.running(self.state.overlay_rows)
            y = _low_rank(y, x, self.overlay.a[rows], self.overlay.b[rows], None, self.overlay.scale)
        return y

    def _dropout(self, x: Tensor, lanes: int) -> Tensor:
        p = self.state.dropout
        if not p or not self.state.training:
            return x
        if not self.state.fused:
            mask = torch.rand(x.shape, generator=self.state.generators[self.state.first]) >= p
            return x * (mask.to(x) / (1 - p))
        # Each lane draws in its own shape: what is drawn must not depend on the group's padding.
        keep = torch.ones(lanes, x.shape[0] // lanes, *x.shape[1:], device=x.device, dtype=x.dtype)
        for lane, (rows, tokens) in enumerate(self.state.shapes):
            own = (rows, tokens, x.shape[-1]) if x.dim() == 3 else (rows, x.shape[-1])
            mask = torch.rand(own, generator=self.state.generators[lane]) >= p
            where = (lane, slice(rows), slice(tokens)) if x.dim() == 3 else (lane, slice(rows))
            keep[where] = mask.to(x) / (1 - p)
        return x * keep.view(x.shape)


def _low_rank(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, lam: Tensor | None, scale: float, weight: Tensor | None = None
) -> Tensor:
    """Y + scale * weight * B (lambda o A x), lane by lane; the weight is that of each row's tokens."""
    lanes = len(a)
    z = torch.bmm(x.reshape(lanes, -1, x.shape[-1]), a.transpose(1, 2))
    if lam is not None:
        z = z * lam.unsqueeze(1).to(z.dtype)
    if weight is not None:
        z = z * weight.repeat_interleave(z.shape[1] // weight.shape[1], 1).unsqueeze(2).to(z.dtype)
    out = torch.baddbmm(y.reshape(lanes, -1, y.shape[-1]), z, b.transpose(1, 2).to(z.dtype), alpha=scale)
    return out.view(y.shape)


def attach(model: nn.Module, linears: Sequence[tuple[str, Linear]], state: LaneState) -> list[LaneLinear]:
    """Replaces the given layers of ``model`` by `LaneLinear` wrappers, in place and in order."""
    wrapped = []
    for name, linear in linears:
        parent = model.get_submodule(name.rpartition(".")[0])
        layer = LaneLinear(linear, name, state)
        setattr(parent, name.rpartition(".")[2], layer)
        wrapped.append(layer)
    return wrapped


_BOUND = ("a", "b", "lam", "under", "overlay", "own")


@contextmanager
def narrowed(layers: Sequence[LaneLinear], dtype: torch.dtype | None) -> Iterator[None]:
    """Until it ends, whatever is bound to the layers is in autocast's type, cast once and not at every call.

    Nothing can be trained meanwhile. ``dtype``: None: nothing to cast.
    """
    if dtype is None:
        yield
        return
    before = [{name: vars(layer)[name] for name in _BOUND} for layer in layers]
    try:
        for layer, had in zip(layers, before, strict=True):
            vars(layer).update(_narrow(had, dtype))
        yield
    finally:
        for layer, had in zip(layers, before, strict=True):
            vars(layer).update(had)


def _narrow(had: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What a `LaneLinear` has bound in another type; lambda goes into B, before it is rounded."""
    a, b, lam, own = (had[name] for name in ("a", "b", "lam", "own"))
    found: dict[str, Any] = {}
    if a is not None and b is not None:
        found |= {"a": a.to(dtype), "b": (b if lam is None else b * lam.unsqueeze(1)).to(dtype), "lam": None}
    if own is not None:
        found["own"] = tuple(None if x is None else x.to(dtype) for x in own)
    branches: dict[str, Branch | None] = {name: had[name] for name in ("under", "overlay")}
    return found | {
        name: replace(branch, a=branch.a.to(dtype), b=branch.b.to(dtype)) for name, branch in branches.items() if branch
    }


def detach(model: nn.Module, layers: Sequence[LaneLinear]) -> None:
    """Undoes `attach`: the frozen layers take their places again."""
    for layer in layers:
        model.set_submodule(layer.name, layer.base)


class LaneEmbedding(nn.Module):
    """Looks ids up in the table of each lane's client; without bound tables it is the frozen table itself.

    Args:
        base: frozen table (V, d).
        state: shared by all lane-wise layers of the model.
    """

    def __init__(self, base: nn.Embedding, state: LaneState) -> None:
        super().__init__()
        self.base, self.state = base, state
        self.tables: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen table, for code that asks an embedding for its type."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (k*b, T), or (1, T) that stand for all rows (positions), to (k*b, T, d)."""
        rows = self.state.overlay_rows
        if self.tables is None or rows is None:
            out: Tensor = self.base(ids)
            return out
        table = torch.repeat_interleave(self.state.running(rows), self.state.rows)
        return self.tables[table.unsqueeze(1), ids.expand(len(table), -1)]
