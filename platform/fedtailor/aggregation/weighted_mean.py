"""FedAvg's mean (McMahan et al., 2017): clients' parameters weighted by their number of examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.core.messages import Row


@dataclass(frozen=True)
class WeightedSum:
    """Sum of weight * row, and the sum of weights. In float64, but for the masked sums of secure aggregation."""

    total: npt.NDArray[Any]
    weight: float

    def merged(self, other: WeightedSum) -> WeightedSum:
        """Both sums, this one first."""
        return WeightedSum(self.total + other.total, self.weight + other.weight)


@dataclass(frozen=True)
class WeightedMean:
    r""":math:`\sum_k n_k w_k / \sum_k n_k`, summed in cohort order within a segment and segment order after that.

    Args:
        uniform: weigh every client 1 (PF2LoRA) instead of by examples.

    >>> mean = WeightedMean()
    >>> state = mean.add(mean.zero(2), np.array([1.0, 0.0], np.float32), 3.0)
    >>> state = mean.merge(state, mean.add(mean.zero(2), np.array([5.0, 4.0], np.float32), 1.0))
    >>> [float(x) for x in mean.result(state)]
    [2.0, 1.0]
    """

    uniform: bool = False
    presum: bool = True

    def zero(self, size: int) -> WeightedSum:
        """The empty sum."""
        return WeightedSum(np.zeros(size, np.float64), 0.0)

    def add(self, state: WeightedSum, row: Row, weight: float) -> WeightedSum:
        """One client more. Reuses the buffer of ``state``, which must not be used again."""
        weight = 1.0 if self.uniform else float(weight)
        np.add(state.total, np.multiply(row, weight, dtype=np.float64), out=state.total)
        return WeightedSum(state.total, state.weight + weight)

    def merge(self, left: WeightedSum, right: WeightedSum) -> WeightedSum:
        """Left, then right."""
        return left.merged(right)

    def result(self, state: WeightedSum) -> Row:
        """The mean, float32.

        Raises:
            ZeroDivisionError: no client was added.
        """
        if state.weight <= 0:
            raise ZeroDivisionError("the mean of no clients")
        return (state.total / state.weight).astype(np.float32)

    def weight(self, state: WeightedSum) -> float:
        """Total weight."""
        return state.weight
