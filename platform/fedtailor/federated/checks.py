"""Is what came back what was asked for: from a worker's segment, and from a method's functions?

A worker checks its own clients' updates (finite, shapes). What arrives may still be wrong: another version of the code
on one node, a damaged node, a mistake in a method. Results are checked by names, never by position, before they are
summed. One bad segment is refused as a whole, since its sum cannot be taken apart; its clients then count as failed,
and the policy for failed clients applies.

What a method's functions return is checked against `federated.method`: one sentence per rule, no guessing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtailor.core.errors import MethodError, listed
from fedtailor.core.messages import METRIC_COLUMNS, Failure, SegmentResult
from fedtailor.core.scope import ParamSpec
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Aggregator, Overlay, Personalised, Personaliser, Report
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet


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
    checked = []
    for result, clients in zip(results, asked, strict=True):
        problem = next(_problems(result, clients, aggregator, size, private), None)
        if problem is not None:
            reason = f"the answer of segment {result.index} is refused: {problem}"
            result = SegmentResult(
                result.stage, result.round, result.index, result.attempt, warnings=result.warnings,
                failures=[Failure(client, result.stage, result.round, "exception", reason) for client in clients],
                seconds=result.seconds, host=result.host,
            )  # fmt: skip
        checked.append(result)
    return checked


def _problems(
    result: SegmentResult, clients: tuple[str, ...], aggregator: Aggregator | None, size: int, private: int | None
) -> Iterator[str]:
    yield from _client_problems(result, clients)
    yield from _metric_problems(result)
    if not result.valid or aggregator is None:
        return
    if aggregator.presum:
        yield from _state_problems(aggregator.zero(size), result.partial)
        if not aggregator.weight(result.partial) > 0:
            yield f"the weight of partial is {aggregator.weight(result.partial)}"
    elif not isinstance(result.partial, list):
        yield f"partial is {_kind(result.partial)}, expected one update per client"
    else:
        names = [client for client, _, _ in result.partial]
        if names != list(result.valid):
            yield f"partial has updates of {listed(names)}, counted are {listed(result.valid)}"
        for client, row, weight in result.partial:
            yield from _array_problems(f"the update of client {client}", np.zeros(size, np.float32), row)
            if not (np.isfinite(weight) and weight > 0):
                yield f"the weight of client {client} is {weight}"
    for client, row in result.private.items():
        where, length = f"the private row of client {client}", row.size if private is None else private
        if client not in result.valid:
            yield f"{where}, which is not counted, was sent"
        yield from _array_problems(where, np.zeros(length, np.float32), row)
    if private and (missing := [client for client in result.valid if client not in result.private]):
        yield f"client {listed(missing)} has no private row"


def _client_problems(result: SegmentResult, clients: tuple[str, ...]) -> Iterator[str]:
    """Every client that was asked for is counted or failed, exactly once, and in the order asked."""
    named = Counter([*result.valid, *(failure.client for failure in result.failures)])
    if unknown := sorted(named.keys() - set(clients)):
        yield f"client {listed(unknown)} was not asked for"
    if twice := [client for client, times in named.items() if times > 1]:
        yield f"client {listed(twice)} is named twice"
    if silent := [client for client in clients if client not in named]:
        yield f"client {listed(silent)} is neither counted nor reported as failed"
    counted = set(result.valid)
    if list(result.valid) != [client for client in clients if client in counted]:
        yield "its clients are not in the order asked for"


def _metric_problems(result: SegmentResult) -> Iterator[str]:
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


def _state_problems(expected: Any, found: Any) -> Iterator[str]:
    """In what an aggregator's state, mostly a record of arrays and numbers, is not built like its empty one."""
    if type(found) is not type(expected):
        yield f"partial is {_kind(found)}, expected {_kind(expected)}"
        return
    wanted, parts = _parts(expected), _parts(found)
    if list(parts) != list(wanted):
        yield f"partial has the tensors {list(parts)}, expected {list(wanted)}"
        return
    for name, value in wanted.items():
        if isinstance(value, np.ndarray):
            yield from _array_problems(f"partial.{name}", value, parts[name])
        elif isinstance(value, float) and not (isinstance(parts[name], (int, float)) and np.isfinite(parts[name])):
            yield f"partial.{name} is {parts[name]!r}"


def _parts(state: Any) -> Mapping[str, Any]:
    if isinstance(state, Mapping):
        return state
    return vars(state) if is_dataclass(state) else {"state": state}


def _array_problems(where: str, expected: Any, found: Any) -> Iterator[str]:
    if not isinstance(found, np.ndarray):
        yield f"{where} is {_kind(found)}, expected an array"
    elif (found.shape, found.dtype) != (expected.shape, expected.dtype):
        yield f"{where} is {found.dtype} {found.shape}, expected {expected.dtype} {expected.shape}"
    elif found.dtype.kind == "f" and not np.isfinite(found).all():
        yield f"{where} is not finite (NaN or Inf)"


def _kind(value: Any, absent: str = "missing") -> str:
    return absent if value is None else f"a {type(value).__name__}"


def check_report(report: Any, lanes: int) -> Report:
    """A local update's answer about K lanes.

    Raises:
        MethodError: it is no `Report`, or a metric is not (K,).
    """
    if not isinstance(report, Report):
        raise MethodError(f"a local update returns a Report, not {_kind(report, 'None')}")
    _check_metrics(report.metrics, lanes, "a local update's")
    return report


def check_personalised(made: Any, ctx: ClientContext, personaliser: Personaliser, classes: int | None) -> Personalised:
    """A personaliser's answer about the clients of ``ctx``, its class scores checked at every call.

    Args:
        made: what was returned.
        ctx: what the personaliser was given.
        personaliser: which one it was.
        classes: C; None: answers are generated, by the model itself.

    Raises:
        MethodError: lanes that are not client-major, metrics that are not (K,), ranks that are not (K, L), spectra that
            are not (K, R), strategies of others than these clients; later, logits that are not (k, m, C).
    """
    if not isinstance(made, Personalised):
        raise MethodError(f"a personaliser returns a Personalised, not {_kind(made, 'None')}")
    budgets = ctx.budgets if personaliser.budgeted else (None,)
    expected = [(lane.client.id, budget) for lane in ctx.lanes for budget in budgets]
    found = [(lane.client.id, lane.budget) for lane in made.lanes]
    if found != expected:
        raise MethodError(
            f"Personalised.lanes are client-major, every client at the budgets {list(budgets)} in this order "
            f"(budgeted={personaliser.budgeted}): expected {listed(expected, 4)}, got {listed(found, 4)}"
        )
    _check_metrics(made.metrics, len(found), "a personaliser's")
    layers = len(ctx.net.adapted)
    if made.ranks is not None and tuple(made.ranks.shape) != (len(found), layers):
        raise MethodError(f"Personalised.ranks are (K, L) = ({len(found)}, {layers}), got {tuple(made.ranks.shape)}")
    for name, values in made.spectra.items():
        if name not in ctx.net.modules or values.dim() != 2 or len(values) != len(found):
            raise MethodError(
                f"Personalised.spectra are (K, R), K = {len(found)}, of adapted modules: '{name}' is "
                f"{tuple(values.shape)}"
            )
    others = made.strategy.keys() - {lane.client.id for lane in ctx.lanes}
    if others:
        raise MethodError(f"Personalised.strategy is of this group's clients, got {listed(sorted(others), 4)}")
    return made if classes is None else replace(made, logits=_Scores(made.logits, classes))


def check_loss(loss: Tensor, lanes: int) -> Tensor:
    """The loss of a step over the k lanes that still run.

    Raises:
        MethodError: it is not (k,).
    """
    if tuple(loss.shape) != (lanes,):
        raise MethodError(
            f"a loss is (k,) = ({lanes},), one mean per running lane, got {tuple(loss.shape)}: "
            "a number for all lanes together makes a client's step depend on who runs beside it"
        )
    return loss


def check_overlay(overlay: Overlay | None, private: Sequence[ParamSpec], net: LaneNet) -> None:
    """What later stages lay over the base must be what this one keeps for each client.

    Raises:
        MethodError: the overlay's specs are not the PRIVATE ones.
    """
    if overlay is None:
        return
    kept, laid = ([(spec.name, spec.shape) for spec in specs] for specs in (private, overlay.specs(net)))
    if kept != laid:
        raise MethodError(
            "an overlay has the specs of the method's PRIVATE parameters, in their order; PRIVATE are "
            f"{listed(kept, 4) or 'none'}, the overlay has {listed(laid, 4) or 'none'}"
        )


class _Scores:
    """Class scores whose shape is checked."""

    def __init__(self, logits: Any, classes: int) -> None:
        self._logits, self._classes = logits, classes

    def __call__(self, batch: LaneBatch) -> Tensor:
        found: Tensor = self._logits(batch)
        expected = (*batch.labels.shape, self._classes)
        if tuple(found.shape) != expected:
            raise MethodError(f"Personalised.logits are (k, b, C) = {expected}, got {tuple(found.shape)}")
        return found


def _check_metrics(metrics: Mapping[str, Any], lanes: int, whose: str) -> None:
    for name, values in metrics.items():
        if not isinstance(values, Tensor) or tuple(values.shape) != (lanes,):
            shape = tuple(values.shape) if isinstance(values, Tensor) else _kind(values, "None")
            raise MethodError(f"{whose} metrics are (K,) = ({lanes},), one number per lane: '{name}' is {shape}")


def bad_metrics(metrics: Mapping[str, Tensor], lane: int) -> list[str]:
    """Names of a lane's metrics that are NaN or Inf."""
    return [name for name, values in metrics.items() if not torch.isfinite(values[lane]).all()]
