"""Coordinate-wise median (Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtailor.aggregation.rows import Row, RowKeeper, Rows


@dataclass(frozen=True)
class CoordinateMedian(RowKeeper):
    """The median of every coordinate; of an even number of clients the mean of the two in the middle.

    >>> median = CoordinateMedian()
    >>> state = median.zero(2)
    >>> for row in ([0.0, 1.0], [1.0, 2.0], [1e6, -1e6]):
    ...     state = median.add(state, np.array(row, np.float32), 1.0)
    >>> [float(x) for x in median.result(state)]
    [1.0, 1.0]
    """

    def result(self, state: Rows) -> Row:
        """(P,) float32."""
        return np.asarray(np.median(state.matrix(), axis=0), np.float32)
