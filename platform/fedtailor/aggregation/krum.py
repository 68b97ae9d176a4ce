"""Krum and Multi-Krum (Blanchard et al., "Machine Learning with Adversaries", NeurIPS 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.spatial.distance import pdist, squareform

from fedtailor.aggregation.rows import Row, RowKeeper, Rows


@dataclass(frozen=True)
class Krum(RowKeeper):
    """The mean of the clients whose nearest neighbours are nearest.

    A client's score is the sum of its squared distances to its n - f - 2 nearest others (at least one); the ``kept``
    clients with the least scores are averaged, earlier ones first where scores are equal.

    Args:
        byzantine: share of the clients that may be anything; f = floor(byzantine * n).
        kept: clients averaged; None: n - f (Multi-Krum), 1: Krum.
    """

    byzantine: float
    kept: int | None = None

    def result(self, state: Rows) -> Row:
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
