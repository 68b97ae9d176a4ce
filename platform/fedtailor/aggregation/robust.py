"""Robust aggregators, which compare clients' rows: coordinate-wise median, trimmed mean, Krum.

Median and trimmed mean: Yin et al., "Byzantine-Robust Distributed Learning", ICML 2018. Krum and Multi-Krum: Blanchard
et al., "Machine Learning with Adversaries", NeurIPS 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import pdist, squareform

from fedtailor.core.messages import Row


@dataclass(frozen=True)
class ClientRows:
    """Rows (P,) float32 in cohort order."""

    rows: tuple[Row, ...]

    def matrix(self) -> npt.NDArray[np.float32]:
        """All rows, (n, P).

        Raises:
            ZeroDivisionError: no client was added.
        """
        if not self.rows:
            raise ZeroDivisionError("the aggregate of no clients")
        return np.stack(self.rows)


@dataclass(frozen=True)
class PerClientAggregator:
    """The collecting half of a robust aggregator: rows travel one by one, and each client counts once.

    Weights are not used: how many examples a client has is its own claim, and a liar could claim any number.
    """

    @property
    def presum(self) -> bool:
        """False: a sum would hide the liar."""
        return False

    def zero(self, size: int) -> ClientRows:
        """No rows."""
        return ClientRows(())

    def add(self, state: ClientRows, row: Row, weight: float) -> ClientRows:
        """One client more."""
        return ClientRows((*state.rows, row))

    def merge(self, left: ClientRows, right: ClientRows) -> ClientRows:
        """Left, then right."""
        return ClientRows((*left.rows, *right.rows))

    def weight(self, state: ClientRows) -> float:
        """Number of clients."""
        return float(len(state.rows))


@dataclass(frozen=True)
class CoordinateMedian(PerClientAggregator):
    """The median of every coordinate; of an even number of clients the mean of the two in the middle.

    >>> median = CoordinateMedian()
    >>> state = median.zero(2)
    >>> for row in ([0.0, 1.0], [1.0, 2.0], [1e6, -1e6]):
    ...     state = median.add(state, np.array(row, np.float32), 1.0)
    >>> [float(x) for x in median.result(state)]
    [1.0, 1.0]
    """

    def result(self, state: ClientRows) -> Row:
        """(P,) float32."""
        return np.asarray(np.median(state.matrix(), axis=0), np.float32)


@dataclass(frozen=True)
class TrimmedMean(PerClientAggregator):
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

    def result(self, state: ClientRows) -> Row:
        """(P,) float32; summed in float64."""
        from scipy.stats import trim_mean  # a quarter of a second that no worker should wait for at its start

        return np.asarray(trim_mean(state.matrix().astype(np.float64), self.trim, axis=0), np.float32)


@dataclass(frozen=True)
class Krum(PerClientAggregator):
    """The mean of the clients whose nearest neighbours are nearest.

    A client's score is the sum of its squared distances to its n - f - 2 nearest others (at least one); the ``kept``
    clients with the least scores are averaged, earlier ones first where scores are equal.

    Args:
        byzantine: share of the clients that may be anything; f = floor(byzantine * n).
        kept: clients averaged; None: n - f (Multi-Krum), 1: Krum.
    """

    byzantine: float
    kept: int | None = None

    def result(self, state: ClientRows) -> Row:
        """(P,) float32."""
        rows = state.matrix().astype(np.float64)
        chosen = self.chosen(rows)
        return np.asarray(rows[chosen].mean(axis=0), np.float32)

    def chosen(self, rows: npt.NDArray[np.float64]) -> list[int]:
        """Indices of the clients that are averaged, ascending.

        Args:
            rows: (n, P).

        >>> Krum(0.25, 2).chosen(np.array([[0.0], [0.1], [9.0], [0.2]]))
        [0, 1]
        """
        clients = len(rows)
        liars = math.floor(self.byzantine * clients)
        kept = min(self.kept or clients - liars, clients)
        if clients == 1:
            return [0]
        distances = np.sort(squareform(pdist(rows, "sqeuclidean")), axis=1)
        neighbours = max(1, clients - liars - 2)
        scores = distances[:, 1 : 1 + neighbours].sum(axis=1)
        return sorted(int(i) for i in np.argsort(scores, kind="stable")[:kept])
