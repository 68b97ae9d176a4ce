"""Lanes: K clients (or K budgets of one client) trained by one forward and one backward pass.

Every trained tensor carries a leading lane axis. The tensors are leaf views of one flat buffer per scope,
with ``.grad`` preset to views of a flat gradient buffer: one copy in, one copy out, and the optimizer works on
whole buffers. Lanes are ordered by falling number of steps, so those still running are always a prefix.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fedtailor.core.scope import ParamSpec, Ranks, Scope

if TYPE_CHECKING:
    from fedtailor.lanes.net import LaneNet


# Lane views are strided on purpose (one flat row per lane); autograd then accumulates in place, as wanted.
warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")


@dataclass(frozen=True)
class FlatSlice:
    """A run of neighbouring parameters: values and gradients, each (K, n), views of the flat buffers."""

    value: Tensor
    grad: Tensor


class LaneParams:
    """K copies of the parameters in ``specs``.

    Args:
        specs: names, shapes (without lane axis) and scopes; FROZEN ones are not allowed.
        lanes: K.
        device: where the buffers live.
        dtype: float32, or float64 in identity tests.
        trained: False: values only, no gradients, half the memory.

    Attributes:
        optimizer_ranks: ranks that share the optimizer's state, each keeping its own part of it (ZeRO stage 1;
            Rajbhandari et al., 2020, section 5.1); None: all of it is kept here.
    """

    def __init__(
        self,
        specs: Sequence[ParamSpec],
        lanes: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        trained: bool = True,
    ) -> None:
        self.specs, self.lanes = tuple(specs), lanes
        self.optimizer_ranks: Ranks | None = None
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"parameter declared twice: {sorted({n for n in names if names.count(n) > 1})}")
        if any(spec.scope is Scope.FROZEN for spec in specs):
            raise ValueError("FROZEN parameters are not trained and have no lanes")
        self._flat: dict[Scope, Tensor] = {}
        self._grad: dict[Scope, Tensor] = {}
        self._where: dict[str, tuple[Scope, int, int]] = {}
        self._view: dict[str, Tensor] = {}
        for scope in (Scope.SHARED, Scope.PRIVATE, Scope.EPHEMERAL):
            members = [spec for spec in self.specs if spec.scope is scope]
            total = sum(spec.size for spec in members)
            flat = self._flat[scope] = torch.zeros(lanes, total, device=device, dtype=dtype)
            grad = self._grad[scope] = torch.zeros_like(flat) if trained else flat[:, :0]
            start = 0
            for spec in members:
                stop = start + spec.size
                view = flat[:, start:stop].view(lanes, *spec.shape)
                if trained:
                    view.requires_grad_().grad = grad[:, start:stop].view(lanes, *spec.shape)
                self._view[spec.name], self._where[spec.name] = view, (scope, start, stop)
                start = stop

    def __getitem__(self, name: str) -> Tensor:
        """The leaf tensor (K, *shape) of a parameter."""
        return self._view[name]

    def __contains__(self, name: str) -> bool:
        """Whether a parameter of this name exists."""
        return name in self._view

    def flat(self, scope: Scope) -> Tensor:
        """The buffer (K, P) of a scope. A live view: copy before handing it out."""
        return self._flat[scope]

    def of_scope(self, scope: Scope) -> tuple[ParamSpec, ...]:
        """Specs of a scope in flat order."""
        return tuple(spec for spec in self.specs if spec.scope is scope)

    def set(self, name: str, value: Tensor) -> None:
        """Copies ``value``, (*shape) for all lanes or (K, *shape), into a parameter."""
        with torch.no_grad():
            self._view[name].copy_(value)

    def zero_gradients(self) -> None:
        """Forgets all gradients."""
        for grad in self._grad.values():
            grad.zero_()

    def sum_gradients(self, ranks: Ranks) -> None:
        """Adds up the gradients of all ranks, in place."""
        for grad in self._grad.values():
            if grad.numel():
                ranks.sum_(grad)

    def slices(self, names: Iterable[str]) -> list[FlatSlice]:
        """The given parameters as few flat slices: neighbours in a buffer become one."""
        wanted = sorted((self._where[name] for name in names), key=lambda w: (w[0].value, w[1]))
        merged: list[tuple[Scope, int, int]] = []
        for scope, start, stop in wanted:
            if merged and merged[-1][0] is scope and merged[-1][2] == start:
                merged[-1] = (scope, merged[-1][1], stop)
            else:
                merged.append((scope, start, stop))
        return [FlatSlice(self._flat[s].detach()[:, a:b], self._grad[s][:, a:b]) for s, a, b in merged]


def clip_lanes(slices: Sequence[FlatSlice], max_norm: float, lanes: int) -> Tensor:
    """Scales each lane's gradient to Euclidean norm ``max_norm`` at most, as torch's clip_grad_norm_ does for one.

    Args:
        slices: what is measured and scaled together.
        max_norm: positive.
        lanes: number of leading lanes to treat.

    Returns:
        Norms before clipping, (lanes,).
    """
    norm = torch.stack([s.grad[:lanes].square().sum(1) for s in slices]).sum(0).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).unsqueeze(1)
    for s in slices:
        s.grad[:lanes] *= factor
    return norm


class Parameters(Protocol):
    """A set of trained parameters: declares them and gives their initial values."""

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Names, shapes and scopes."""

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Initial values without lane axis; equal on every worker."""


class Adapter(Parameters, Protocol):
    """Parameters that change what the model computes."""

    @property
    def lanes(self) -> bool:
        """False: one client at a time."""

    @property
    def trains_base(self) -> bool:
        """Whether the model's own weights are what is trained."""

    @property
    def r_init(self) -> int:
        """Ranks per layer of which a strategy chooses; 0: it chooses none."""

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Makes the model compute with ``params``."""
