"""Adam (Kingma & Ba, 2015) over lanes: one fused step, yet each lane is a separate ``torch.optim.Adam``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedtailor.core.lanes import FlatSlice, LaneParams


@dataclass(frozen=True)
class AdamGroup:
    """Parameters that share a learning rate.

    Args:
        names: parameters of the `LaneParams`.
        lr: learning rate.
        zero_grad: False keeps the gradient over steps (a reference bug that some experiments need).
        rounded: bfloat16 emulates weights without an fp32 master copy: every step is rounded to it.
    """

    names: tuple[str, ...]
    lr: float
    zero_grad: bool = True
    rounded: torch.dtype | None = None


class LaneAdam:
    r"""Adam without weight decay; step counts are kept per lane.

    .. math::
        m &= \beta_1 m + (1-\beta_1) g, \quad v = \beta_2 v + (1-\beta_2) g^2 \\
        w &= w - \frac{lr}{1-\beta_1^t} \, m \, / \left(\sqrt{v / (1-\beta_2^t)} + \epsilon\right)

    Args:
        params: the lanes' parameters.
        groups: disjoint groups.
        betas: decay of the two moments.
        eps: added to the denominator.
    """

    def __init__(
        self,
        params: LaneParams,
        groups: Sequence[AdamGroup],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self._betas, self._eps = betas, eps
        self.groups = tuple(groups)
        self.slices: list[list[FlatSlice]] = [params.slices(group.names) for group in groups]
        self._moments = [
            [(torch.zeros_like(s.value), torch.zeros_like(s.value)) for s in slices] for slices in self.slices
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
        b1, b2 = self._betas
        self.steps[:lanes] += 1
        t = self.steps[:lanes]
        correction1, correction2 = 1 - b1**t, (1 - b2**t).sqrt()
        for group, slices, moments in zip(self.groups, self.slices, self._moments, strict=True):
            for s, (m, v) in zip(slices, moments, strict=True):
                value, grad = s.value[:lanes], s.grad[:lanes]
                step_size = (group.lr / correction1).to(value.dtype)
                self._update(value, grad, m[:lanes], v[:lanes], step_size, correction2.to(value.dtype))
                if group.rounded is not None:
                    value.copy_(value.to(group.rounded))

    def _update(self, value: Tensor, grad: Tensor, m: Tensor, v: Tensor, step_size: Tensor, root: Tensor) -> None:
        b1, b2 = self._betas
        m.lerp_(grad, 1 - b1)
        v.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        denominator = v.sqrt().div_(root).add_(self._eps)
        value.sub_(denominator.reciprocal_().mul_(m).mul_(step_size))
