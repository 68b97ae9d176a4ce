"""Checks of segment results before they are summed, by names, never by position; the norm bound of updates.

A worker checks its own clients' updates (finite, shapes). What arrives may still be wrong: another version of the code
on one node, a damaged node, a mistake in a method. One bad segment is refused as a whole, since its sum cannot be
taken apart; its clients then count as failed, and the policy for failed clients applies.

An update's norm is measured and clipped where it was trained, and watched by the server.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np

from fedtailor.core.errors import listed
from fedtailor.core.messages import METRIC_COLUMNS, Failure, FloatArray, Row, SegmentResult
from fedtailor.federated.method import Aggregator

_EPS = float(np.finfo(np.float64).eps)


def checked_results(
    results: Sequence[SegmentResult],
    asked: Sequence[tuple[str, ...]],
    aggregator: Aggregator | None = None,
    size: int = 0,
    private: int | None = None,
) -> list[SegmentResult]:
    """Results of a round or chunk, each as it came or, if it is not what was asked for, empty with every client failed.

    Args:
        results: in segment order.
        asked: clients of each segment, in order.
        aggregator: whose states the sums must be; None: nothing is summed (personalising).
        size: SHARED numbers P.
        private: PRIVATE numbers of a client; None: not known here.

    Returns:
        As many results; failures of a refused one have the kind ``exception`` and name segment and tensor.
    """
    expected = aggregator.zero(size) if aggregator and aggregator.presum else None
    checked = []
    for result, clients in zip(results, asked, strict=True):
        problem = next(_problems(result, clients, aggregator, expected, size, private), None)
        checked.append(result if problem is None else _refused(result, clients, problem))
    return checked


def _refused(result: SegmentResult, clients: tuple[str, ...], problem: str) -> SegmentResult:
    reason = f"the answer of segment {result.index} is refused: {problem}"
    failures = [Failure(client, result.stage, result.round, "exception", reason) for client in clients]
    return SegmentResult(
        result.stage, result.round, result.index, result.attempt, failures=failures, warnings=result.warnings,
        seconds=result.seconds, host=result.host,
    )  # fmt: skip


def _problems(
    result: SegmentResult,
    clients: tuple[str, ...],
    aggregator: Aggregator | None,
    expected: Any,
    size: int,
    private: int | None,
) -> Iterator[str]:
    yield from _check_clients(result, clients)
    yield from _row_problems(result)
    if not result.valid or aggregator is None:
        return
    if aggregator.presum:
        yield from _differences("partial", expected, result.partial)
        if not aggregator.weight(result.partial) > 0:
            yield f"the weight of partial is {aggregator.weight(result.partial)}"
    else:
        yield from _list_problems(result, size)
    yield from _private_problems(result, private)


def _check_clients(result: SegmentResult, clients: tuple[str, ...]) -> Iterator[str]:
    """Every client that was asked for is counted or failed, exactly once, and in the order asked."""
    failed = [failure.client for failure in result.failures]
    named = Counter([*result.valid, *failed])
    unknown = sorted(named.keys() - set(clients))
    if unknown:
        yield f"client {listed(unknown)} was not asked for"
    twice = [client for client, times in named.items() if times > 1]
    if twice:
        yield f"client {listed(twice)} is named twice"
    silent = [client for client in clients if client not in named]
    if silent:
        yield f"client {listed(silent)} is neither counted nor reported as failed"
    counted = set(result.valid)
    if list(result.valid) != [client for client in clients if client in counted]:
        yield "its clients are not in the order asked for"


def _row_problems(result: SegmentResult) -> Iterator[str]:
    keys, counted = set(), set(result.valid)
    for row in result.metrics:
        if set(row) != set(METRIC_COLUMNS):
            yield f"a metric of client {row.get('client')} has the columns {sorted(row)}"
            return
        if row["client"] not in counted:
            yield f"metric {row['metric']} is of client '{row['client']}', which is not counted in it"
        if row["round"] != result.round:
            yield f"metric {row['metric']} of client {row['client']} is of round {row['round']}"
        key = tuple(row[name] for name in ("client", "language", "budget", "module", "metric"))
        if key in keys:
            yield f"metric {row['metric']} of client {row['client']} occurs twice"
        keys.add(key)
    measured = {row["client"] for row in result.metrics}
    if measured and (silent := [client for client in result.valid if client not in measured]):
        yield f"client {listed(silent)} has no metrics, others have"


def _list_problems(result: SegmentResult, size: int) -> Iterator[str]:
    """Updates sent one by one, for aggregators that must see each."""
    if not isinstance(result.partial, list):
        yield f"partial is {_kind(result.partial)}, expected one update per client"
        return
    names = [client for client, _, _ in result.partial]
    if names != list(result.valid):
        yield f"partial has updates of {listed(names)}, counted are {listed(result.valid)}"
    expected = np.zeros(size, np.float32)
    for client, row, weight in result.partial:
        yield from _differences(f"the update of client {client}", expected, row)
        if not (np.isfinite(weight) and weight > 0):
            yield f"the weight of client {client} is {weight}"


def _private_problems(result: SegmentResult, size: int | None) -> Iterator[str]:
    for client, row in result.private.items():
        where = f"the private row of client {client}"
        if client not in result.valid:
            yield f"{where}, which is not counted, was sent"
        length = row.size if size is None else size
        yield from _differences(where, np.zeros(length, np.float32), row)
    if size and (missing := [client for client in result.valid if client not in result.private]):
        yield f"client {listed(missing)} has no private row"


def _differences(where: str, expected: Any, found: Any) -> Iterator[str]:
    """In what a value is not built like another, part by part."""
    if isinstance(expected, np.ndarray):
        if not isinstance(found, np.ndarray):
            yield f"{where} is {_kind(found)}, expected an array"
        elif (found.shape, found.dtype) != (expected.shape, expected.dtype):
            yield f"{where} is {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
        elif found.dtype.kind == "f" and not np.isfinite(found).all():
            yield f"{where} is not finite (NaN or Inf)"
    elif type(found) is not type(expected) and not (isinstance(expected, float) and isinstance(found, (int, float))):
        yield f"{where} is {_kind(found)}, expected {_kind(expected)}"
    elif is_dataclass(expected):
        for part in fields(expected):
            yield from _differences(f"{where}.{part.name}", getattr(expected, part.name), getattr(found, part.name))
    elif isinstance(expected, Mapping):
        if list(found) != list(expected):
            yield f"{where} has the tensors {list(found)}, expected {list(expected)}"
            return
        for name in expected:
            yield from _differences(f"{where}[{name}]", expected[name], found[name])
    elif isinstance(expected, float) and not np.isfinite(found):
        yield f"{where} is {found}"


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"


def clip_update(row: Row, received: FloatArray, bound: float) -> tuple[Row, float]:
    """Scales an update down to a length, which the float32 result does not exceed.

    Args:
        row: SHARED parameters after training, (P,) float32.
        received: what the client started from, (P,) float32.
        bound: largest L2 norm of ``row - received``.

    Returns:
        The row itself where it is short enough, else ``received`` plus the shortened update; and the norm before.

    >>> row, norm = clip_update(np.array([3.0, 4.0], np.float32), np.zeros(2, np.float32), 1.0)
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
