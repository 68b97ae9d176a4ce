"""Federated early stopping: the rounds end when a metric of the cohorts has not improved for a while."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtailor.core.messages import Row

_BEST, _VALUE, _SINCE = "early_stop.best", "early_stop.value", "early_stop.since"


@dataclass(frozen=True)
class EarlyStop:
    """Stops after ``patience`` rounds without a new lowest value; the best round's parameters are used.

    The cohorts differ from round to round, so the values are noisy; FedP2EFT (A.4, FedL2P) uses 50 rounds of
    patience. The record lives in the server optimizer's state: it is committed, digested and resumed with it.

    Args:
        metric: reported by local updates about the parameters that were *received*.
        patience: rounds.
    """

    metric: str
    patience: int

    def follow(self, shared: Row, server: Mapping[str, Row], metrics: Sequence[Mapping[str, Any]]) -> dict[str, Row]:
        """The record after one more round, to be joined to the server's state.

        Args:
            shared: parameters that the cohort received, (P,).
            server: state before the round.
            metrics: rows of the round; the mean is weighted by examples.

        Raises:
            ValueError: no client reported the metric.
        """
        rows = [(float(row["value"]), float(row["weight"])) for row in metrics if row["metric"] == self.metric]
        weight = math.fsum(w for _, w in rows)
        if not weight:
            raise ValueError(f"no client reported '{self.metric}', which decides when to stop")
        # Compared in the type it is kept in: otherwise an equal value could count as a lower one.
        value = float(np.float32(math.fsum(v * w for v, w in rows) / weight))
        if _VALUE not in server or value < float(server[_VALUE][0]):
            return {_BEST: shared.copy(), _VALUE: np.array([value], np.float32), _SINCE: np.zeros(1, np.float32)}
        return {_BEST: server[_BEST], _VALUE: server[_VALUE], _SINCE: server[_SINCE] + np.float32(1)}

    def reached(self, server: Mapping[str, Row]) -> bool:
        """Whether the rounds are over."""
        return _SINCE in server and float(server[_SINCE][0]) >= self.patience


def without_record(server: Mapping[str, Row]) -> dict[str, Row]:
    """The server optimizer's own state."""
    return {name: row for name, row in server.items() if not name.startswith("early_stop.")}


def best_of(server: Mapping[str, Row], newest: Row) -> Row:
    """Parameters of the best round, or ``newest`` where nothing was followed."""
    return server.get(_BEST, newest)
