"""Is what a method's functions return built as `federated.method` says? One sentence per rule, no guessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedtailor.core.errors import MethodError
from fedtailor.core.scope import ParamSpec
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Overlay, Personalised, Personaliser, Report
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet


def check_report(report: Any, lanes: int) -> Report:
    """A local update's answer about K lanes.

    Raises:
        MethodError: it is no `Report`, or a metric is not (K,).
    """
    if not isinstance(report, Report):
        raise MethodError(f"a local update returns a Report, not {_kind(report)}")
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
        MethodError: lanes that are not client-major, metrics that are not (K,), ranks that are not (K, L), strategies
            of others than these clients; later, logits that are not (k, m, C).
    """
    if not isinstance(made, Personalised):
        raise MethodError(f"a personaliser returns a Personalised, not {_kind(made)}")
    budgets = ctx.budgets if personaliser.budgeted else (None,)
    expected = [(lane.client.id, budget) for lane in ctx.lanes for budget in budgets]
    found = [(lane.client.id, lane.budget) for lane in made.lanes]
    if found != expected:
        raise MethodError(
            f"Personalised.lanes are client-major, every client at the budgets {list(budgets)} in this order "
            f"(budgeted={personaliser.budgeted}): expected {_some(expected)}, got {_some(found)}"
        )
    _check_metrics(made.metrics, len(found), "a personaliser's")
    layers = len(ctx.net.adapted)
    if made.ranks is not None and tuple(made.ranks.shape) != (len(found), layers):
        raise MethodError(f"Personalised.ranks are (K, L) = ({len(found)}, {layers}), got {tuple(made.ranks.shape)}")
    others = made.strategy.keys() - {lane.client.id for lane in ctx.lanes}
    if others:
        raise MethodError(f"Personalised.strategy is of this group's clients, got {_some(sorted(others))}")
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
            f"{_some(kept) if kept else 'none'}, the overlay has {_some(laid) if laid else 'none'}"
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
            shape = tuple(values.shape) if isinstance(values, Tensor) else _kind(values)
            raise MethodError(f"{whose} metrics are (K,) = ({lanes},), one number per lane: '{name}' is {shape}")


def bad_metrics(metrics: Mapping[str, Tensor], lane: int) -> list[str]:
    """Names of a lane's metrics that are NaN or Inf."""
    return [name for name, values in metrics.items() if not torch.isfinite(values[lane])]


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _some(values: list[Any]) -> str:
    return ", ".join(map(str, values[:4])) + (f" and {len(values) - 4} more" if len(values) > 4 else "")
