"""Optimizers over lanes: one fused step, yet each lane is a separate ``torch.optim`` optimizer.

Adam (Kingma & Ba, 2015), AdamW where a group decays its weights (Loshchilov & Hutter, 2019), and SGD.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from fedtailor.core.scope import ParamSpec, Ranks
from fedtailor.lanes.params import FlatSlice, LaneParams

CHUNK: Final = 2**18
"""Columns that one pass of the update goes over: they stay in the caches from its first operation to its last."""


@dataclass(frozen=True, eq=False)
class AdamGroup:
    """Parameters that share a learning rate, or that each have one in every lane.

    Args:
        names: parameters of the `LaneParams`.
        lr: learning rate, or (K, number of names): one rate per lane and parameter, in the order of ``names``.
            A tensor whose entries all equal a float gives the same bits as the float.
        zero_grad: False keeps the gradient over steps (a reference bug that some experiments need).
        rounded: bfloat16 emulates weights without an fp32 master copy: every step is rounded to it.
        weight_decay: decoupled decay of AdamW: before its step a weight loses lr * weight_decay of itself.
    """

    names: tuple[str, ...]
    lr: float | Tensor
    zero_grad: bool = True
    rounded: torch.dtype | None = None
    weight_decay: float = 0.0


class LaneAdam:
    r"""Adam, or AdamW in groups with ``weight_decay``; step counts are kept per lane.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2 \\
        w &= w - \frac{lr}{1-\beta_1^t} \, m \, / \left(\sqrt{v / (1-\beta_2^t)} + \epsilon\right)

    Args:
        params: the lanes' parameters.
        groups: disjoint groups.
        betas: decay of the two moments.
        eps: added to the denominator.
        constant_correction: corrects every step's moments like the first one's, by 1 - beta instead of
            1 - beta^t (a reference bug that one experiment needs).

    Raises:
        ValueError: a group's rates are not of shape (K, number of names).
    """

    def __init__(
        self,
        params: LaneParams,
        groups: Sequence[AdamGroup],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        constant_correction: bool = False,
    ) -> None:
        self._betas, self._eps, self._constant = betas, eps, constant_correction
        self.groups = tuple(groups)
        self.slices: list[list[FlatSlice]] = [params.slices(group.names) for group in groups]
        self._ranks = params.optimizer_ranks
        self._own = [[_own_columns(s.value.shape[1], self._ranks) for s in slices] for slices in self.slices]
        self._moments = [
            [
                (torch.zeros_like(s.value[:, own]), torch.zeros_like(s.value[:, own]))
                for s, own in zip(*both, strict=True)
            ]
            for both in zip(self.slices, self._own, strict=True)
        ]
        self._members = [_in_flat_order(params, group.names) for group in self.groups]
        self._rates = [
            _expand(group, params.lanes, members, slices)
            for group, members, slices in zip(self.groups, self._members, self.slices, strict=True)
        ]
        reference = next(s.value for slices in self.slices for s in slices)
        self.steps = torch.zeros(params.lanes, 1, dtype=torch.float64, device=reference.device)

    def zero_grad(self) -> None:
        """Sets the gradients of all groups to zero, in place."""
        for group, slices in zip(self.groups, self.slices, strict=True):
            if group.zero_grad:
                for s in slices:
                    s.grad.zero_()

    @torch.no_grad()
    def step(self, lanes: int) -> None:
        """Updates the first ``lanes`` lanes; the others keep their values, moments and step counts."""
        self.steps[:lanes] += 1
        correction1, correction2 = self._corrections(lanes)
        every = zip(self.groups, self.slices, self._moments, self._rates, self._own, strict=True)
        for group, slices, moments, rates, owned in every:
            for s, (m, v), rate, own in zip(slices, moments, rates, owned, strict=True):
                value, grad = s.value[:lanes, own], s.grad[:lanes, own]
                step_size = rate.step_size(lanes, correction1).to(value.dtype)
                spread = rate.spread(step_size, own)
                if group.weight_decay:
                    left = 1 - group.weight_decay * rate.step_size(lanes, torch.ones_like(correction1))
                    value.mul_(rate.spread(left.to(value.dtype), own))
                self._update(value, grad, m[:lanes], v[:lanes], spread, correction2.to(value.dtype))
                if group.rounded is not None:
                    value.copy_(value.to(group.rounded))
                self._collect(s.value[:lanes], own)

    def _collect(self, whole: Tensor, own: slice) -> None:
        """Fills the columns that other ranks own; exact, since what is added to them is 0."""
        if self._ranks is not None:
            whole[:, : own.start] = 0
            whole[:, own.stop :] = 0
            self._ranks.sum_(whole)

    @property
    def size(self) -> int:
        """Numbers of a lane that are trained."""
        return sum(s.value.shape[1] for slices in self.slices for s in slices)

    @torch.no_grad()
    def load(self, first: Tensor, second: Tensor, steps: Tensor) -> None:
        """Goes on from moments (K, `size`) and step counts (K, 1), as `state` gave them."""
        self.steps.copy_(steps)
        for kept, start, (m, v), own in self._kept():
            m.copy_(first[:, start : start + kept][:, own])
            v.copy_(second[:, start : start + kept][:, own])

    @torch.no_grad()
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """First and second moments (K, `size`), group by group in flat order, and step counts (K, 1)."""
        lanes = len(self.steps)
        reference = self._moments[0][0][0]
        first, second = reference.new_zeros(lanes, self.size), reference.new_zeros(lanes, self.size)
        for kept, start, moments, own in self._kept():
            for whole, part in zip((first, second), moments, strict=True):
                columns = whole[:, start : start + kept]
                columns[:, own] = part
                self._collect(columns, own)
        return first, second, self.steps.clone()

    def _kept(self) -> Iterator[tuple[int, int, tuple[Tensor, Tensor], slice]]:
        """Of each slice its width and place among all of them, its moments, and the columns that they are of."""
        start = 0
        for slices, moments, owned in zip(self.slices, self._moments, self._own, strict=True):
            for s, pair, own in zip(slices, moments, owned, strict=True):
                yield s.value.shape[1], start, pair, own
                start += s.value.shape[1]

    @torch.no_grad()
    def directions(self, group: int = 0) -> dict[str, Tensor]:
        r"""The direction u of each lane's last step, :math:`w_t = w_{t-1} - lr \, u`, for the group's parameters.

        Args:
            group: index.

        Returns:
            Name to (K, \*shape).
        """
        lanes = len(self.steps)
        correction1, correction2 = self._corrections(lanes)
        parts = []
        for s, (m, v), own in zip(self.slices[group], self._moments[group], self._own[group], strict=True):
            denominator = v.sqrt().div_(correction2.to(v.dtype)).add_(self._eps)
            part = torch.zeros_like(s.value)
            part[:, own] = m / denominator / correction1.to(m.dtype)
            self._collect(part, own)
            parts.append(part)
        members = self._members[group]
        pieces = torch.split_with_sizes(torch.cat(parts, 1), [spec.size for spec in members], 1)
        return {spec.name: piece.view(lanes, *spec.shape) for spec, piece in zip(members, pieces, strict=True)}

    def _corrections(self, lanes: int) -> tuple[Tensor, Tensor]:
        """1 - beta_1^t and the root of 1 - beta_2^t, (lanes, 1) float64."""
        b1, b2 = self._betas
        t = torch.ones_like(self.steps[:lanes]) if self._constant else self.steps[:lanes]
        return 1 - b1**t, (1 - b2**t).sqrt()

    def _update(self, value: Tensor, grad: Tensor, m: Tensor, v: Tensor, step_size: Tensor, root: Tensor) -> None:
        b1, b2 = self._betas
        for start in range(0, value.shape[1], CHUNK):
            part = slice(start, start + CHUNK)
            m_, v_, g = m[:, part], v[:, part], grad[:, part]
            m_.lerp_(g, 1 - b1)
            v_.mul_(b2).addcmul_(g, g, value=1 - b2)
            denominator = v_.sqrt().div_(root).add_(self._eps)
            size = step_size if step_size.shape[1] == 1 else step_size[:, part]
            value[:, part].sub_(denominator.reciprocal_().mul_(m_).mul_(size))


class LaneSgd:
    """Plain gradient descent, without state: w = w - lr g, decayed like `LaneAdam`'s.

    Args:
        params: the lanes' parameters.
        groups: disjoint groups, at one rate each.
    """

    def __init__(self, params: LaneParams, groups: Sequence[AdamGroup]) -> None:
        self.groups = tuple(groups)
        self.slices: list[list[FlatSlice]] = [params.slices(group.names) for group in groups]

    def zero_grad(self) -> None:
        """Sets the gradients of all groups to zero, in place."""
        for slices in self.slices:
            for s in slices:
                s.grad.zero_()

    @torch.no_grad()
    def step(self, lanes: int) -> None:
        """Updates the first ``lanes`` lanes."""
        for group, slices in zip(self.groups, self.slices, strict=True):
            for s in slices:
                value = s.value[:lanes].mul_(1 - group.lr * group.weight_decay)
                value.sub_(s.grad[:lanes] * group.lr)


LaneOptimizer = LaneAdam | LaneSgd


@dataclass(frozen=True, eq=False)
class _Rate:
    """Rates of one slice: a float, or (K, number of names) float64 with the name of each flat position (n,)."""

    lr: float | Tensor
    column: Tensor | None = None

    def step_size(self, lanes: int, correction: Tensor) -> Tensor:
        # In float64 and before spreading, so that equal rates round as the float does.
        return correction.reciprocal() * (self.lr[:lanes] if isinstance(self.lr, Tensor) else self.lr)

    def spread(self, step_size: Tensor, own: slice) -> Tensor:
        return step_size if self.column is None else step_size.index_select(1, self.column[own])


def _own_columns(count: int, ranks: Ranks | None) -> slice:
    """The columns whose moments are kept here: all, or this rank's share where ranks share the optimizer's state."""
    if ranks is None:
        return slice(0, count)
    each = -(-count // ranks.size)
    return slice(min(count, ranks.index * each), min(count, (ranks.index + 1) * each))


def _in_flat_order(params: LaneParams, names: Sequence[str]) -> list[ParamSpec]:
    """Specs of ``names`` in the order in which `LaneParams.slices` lays them out."""
    wanted = set(names)
    return sorted((spec for spec in params.specs if spec.name in wanted), key=lambda spec: spec.scope.value)


def _expand(group: AdamGroup, lanes: int, members: Sequence[ParamSpec], slices: Sequence[FlatSlice]) -> list[_Rate]:
    """One `_Rate` per slice."""
    if not isinstance(group.lr, Tensor):
        return [_Rate(group.lr) for _ in slices]
    if group.lr.shape != (lanes, len(group.names)):
        raise ValueError(f"rates of shape {tuple(group.lr.shape)}, expected {(lanes, len(group.names))}")
    number = {name: index for index, name in enumerate(group.names)}
    columns = torch.tensor([number[spec.name] for spec in members])
    columns = columns.repeat_interleave(torch.tensor([spec.size for spec in members])).to(group.lr.device)
    rates = group.lr.detach().double()
    return [_Rate(rates, part) for part in torch.split_with_sizes(columns, [s.value.shape[1] for s in slices])]
