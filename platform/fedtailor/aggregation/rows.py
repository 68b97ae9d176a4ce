"""Clients' rows kept apart, for aggregators that must compare them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Row = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Rows:
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
class RowKeeper:
    """The collecting half of a robust aggregator: rows travel one by one, and each client counts once.

    Weights are not used: how many examples a client has is its own claim, and a liar could claim any number.
    """

    @property
    def presum(self) -> bool:
        """False: a sum would hide the liar."""
        return False

    def zero(self, size: int) -> Rows:
        """No rows."""
        return Rows(())

    def add(self, state: Rows, row: Row, weight: float) -> Rows:
        """One client more."""
        return Rows((*state.rows, row))

    def merge(self, left: Rows, right: Rows) -> Rows:
        """Left, then right."""
        return Rows((*left.rows, *right.rows))

    def weight(self, state: Rows) -> float:
        """Number of clients."""
        return float(len(state.rows))
