"""A clamp that stops values and lets gradients through (straight-through estimator, Bengio et al., 2013)."""

from __future__ import annotations

import torch
from torch import Tensor


class _ClampThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor, low: float, high: float | None) -> Tensor:
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def clamp_through(value: Tensor, low: float, high: float | None = None) -> Tensor:
    """Clamps to [low, high], any shape; the gradient passes unchanged."""
    result: Tensor = _ClampThrough.apply(value, low, high)  # type: ignore[no-untyped-call]
    return result
