"""Coordinate-wise trimmed mean (Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtailor.aggregation.rows import Row, RowKeeper, Rows


@dataclass(frozen=True)
class TrimmedMean(RowKeeper):
    """The mean of every coordinate without its largest and smallest values.

    Args:
        trim: share cut at each end; of n clients floor(trim * n) values. 0 is the plain mean.

    >>> mean = TrimmedMean(0.34)
    >>> state = mean.zero(1)
    >>> for value in (1.0, 3.0, -1e6):
    ...     state = mean.add(state, np.array([value], np.float32), 1.0)
    >>> float(mean.result(state)[0])
    1.0
    """

    trim: float

    def result(self, state: Rows) -> Row:
        """(P,) float32; summed in float64."""
        from scipy.stats import trim_mean  # a quarter of a second that no worker should wait for at its start

        return np.asarray(trim_mean(state.matrix().astype(np.float64), self.trim, axis=0), np.float32)
