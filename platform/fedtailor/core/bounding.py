"""The length of a client's update: measured where it was trained, cut if it must be, watched by the server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedtailor.core.messages import FloatArray
from fedtailor.core.method import Row

_EPS = float(np.finfo(np.float64).eps)


def bounded(row: Row, received: FloatArray, bound: float) -> tuple[Row, float]:
    """Scales an update down to a length, which the float32 result does not exceed.

    Args:
        row: SHARED parameters after training, (P,) float32.
        received: what the client started from, (P,) float32.
        bound: largest L2 norm of ``row - received``.

    Returns:
        The row itself where it is short enough, else ``received`` plus the shortened update; and the norm before.

    >>> row, norm = bounded(np.array([3.0, 4.0], np.float32), np.zeros(2, np.float32), 1.0)
    >>> [round(float(x), 6) for x in row], norm
    ([0.6, 0.8], 5.0)
    """
    update = np.subtract(row, received, dtype=np.float64)
    norm = math.sqrt(float(np.dot(update, update)))
    if norm <= bound:
        return row, norm
    # The norm of n numbers is known to about n/2 roundings, so that much is given away before the one to float32.
    target = update * (bound / norm * (1 - update.size * _EPS))
    start = np.asarray(received, np.float32)
    row = np.asarray(start + target, np.float32)
    longer = np.abs(np.subtract(row, start, dtype=np.float64)) > np.abs(target)
    return np.where(longer, np.nextafter(row, start), row), norm


def clipped_share(norms: Mapping[str, float], bound: float) -> float | None:
    """Share of updates that were longer than the bound; None without any.

    >>> clipped_share({"a": 1.0, "b": 3.0}, 2.0)
    0.5
    """
    return sum(norm > bound for norm in norms.values()) / len(norms) if norms else None


def norm_alarms(norms: Mapping[str, float], times: float) -> list[dict[str, Any]]:
    """One warning per client whose update is longer than ``times`` the median of the cohort; none for times = 0.

    >>> [alarm["client"] for alarm in norm_alarms({"a": 1.0, "b": 1.2, "c": 500.0}, 10)]
    ['c']
    """
    middle = float(np.median(list(norms.values()))) if norms else 0.0
    return [
        {
            "kind": "norm-alarm", "client": client, "norm": norm, "median": middle,
            "reason": f"an update {norm / middle:.3g} times as long as the cohort's median; "
            "consider a robust aggregation",
        }
        for client, norm in norms.items()
        if times and 0 < middle * times < norm
    ]  # fmt: skip
