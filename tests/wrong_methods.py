"""Methods that are wrong, each in one point. The right one that they are made from is FedDPA-T on a toy.

A, B (global), classifier -> SHARED
A, B (local)              -> PRIVATE
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

from fedtailor.adapters.lora import AdapterPair
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.lanes.net import LaneNet
from fedtailor.methods.feddpa import ENTRY
from fedtailor.methods.feddpa_config import FedDpaConfig
from fedtailor.training.local import Training, train

Change = Callable[[Method], Method]


@dataclass(frozen=True)
class Personaliser:
    """Any function as one."""

    make: Callable[[ClientContext], Personalised]
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        return self.make(ctx)


def before(act: Callable[[ClientContext], object]) -> Change:
    """Something is done at the start of the right local update."""

    def change(method: Method) -> Method:
        def update(ctx: ClientContext) -> Report:
            act(ctx)
            return method.local_update(ctx)

        return replace(method, local_update=update)

    return change


def after(act: Callable[[ClientContext, Report], Report]) -> Change:
    """Something is done at its end."""

    def change(method: Method) -> Method:
        return replace(method, local_update=lambda ctx: act(ctx, method.local_update(ctx)))

    return change


def ends(make: Callable[[ClientContext], Personalised], budgeted: bool = False) -> Change:
    """Another personaliser."""
    return lambda method: replace(method, personaliser=Personaliser(make, budgeted))


def write_to_received(ctx: ClientContext) -> None:
    next(iter(ctx.received.values()))[0].zero_()


@torch.no_grad()
def change_base(ctx: ClientContext, report: Report) -> Report:
    next(ctx.net.model.parameters()).add_(1e-3)
    return report


@torch.no_grad()
def start_again(ctx: ClientContext) -> None:
    ctx.params.flat(Scope.PRIVATE).fill_(0.01)


@torch.no_grad()
def spoil_update(ctx: ClientContext, report: Report) -> Report:
    ctx.params.flat(Scope.SHARED)[0, 0] = float("nan")
    return report


def spoil_metric(ctx: ClientContext, report: Report) -> Report:
    return Report({**report.metrics, "drift": torch.full_like(ctx.sizes, float("nan"))})


def shorten_metric(ctx: ClientContext, report: Report) -> Report:
    return Report({name: values[:-1] for name, values in report.metrics.items()})


def train_on_the_sum(ctx: ClientContext) -> None:
    def loss(batch: LaneBatch) -> Tensor:
        return lane_cross_entropy(ctx.net.logits(batch), batch).sum()

    names = tuple(spec.name for spec in ctx.params.of_scope(Scope.SHARED))
    train(ctx, [AdamGroup(names, 1e-3)], Training(1, 4), loss)


def leave_out_the_local_part(method: Method) -> Method:
    adapter = method.adapter
    assert isinstance(adapter, AdapterPair)

    def make(ctx: ClientContext) -> Personalised:
        adapter.switch(ctx.net, ctx.params, "first")
        return Personalised(ctx.lanes, ctx.net.logits)

    return replace(method, personaliser=Personaliser(make))


def share_the_local_part(method: Method) -> Method:
    adapter = method.adapter
    assert isinstance(adapter, AdapterPair)
    shared = AdapterPair(adapter.first, replace(adapter.second, scope=Scope.SHARED))
    return replace(method, adapter=shared, local_update=replace(method.local_update, adapter=shared), overlay=None)


def share_the_local_part_under_an_overlay(method: Method) -> Method:
    return replace(share_the_local_part(method), overlay=method.overlay)


def train_per_budget(method: Method) -> Method:
    return replace(method, per_budget=True)


class Settled:
    """Says that what its method keeps of a client is settled, and declares nothing itself."""

    settled = True

    def specs(self, net: LaneNet) -> list[ParamSpec]:
        return []

    def initial(self, net: LaneNet, seed: int) -> dict[str, Tensor]:
        return {}


def call_it_settled(method: Method) -> Method:
    return replace(method, modules=(Settled(),))


def scored(change: Callable[[Tensor], Tensor]) -> Callable[[ClientContext], Personalised]:
    return lambda ctx: Personalised(ctx.lanes, lambda batch: change(ctx.net.logits(batch)))


def few_spectra(ctx: ClientContext) -> Personalised:
    spectra = {ctx.net.modules[0]: torch.zeros(len(ctx.lanes) - 1, 2)}
    return Personalised(ctx.lanes, ctx.net.logits, spectra=spectra)


CHANGES: Final[Mapping[str, Change]] = {
    "writes_to_received": before(write_to_received),
    "changes_the_base": after(change_base),
    "forgets_private_between_rounds": before(start_again),
    "forgets_private_in_the_end": leave_out_the_local_part,
    "trains_what_is_settled": call_it_settled,
    "shares_what_is_private": share_the_local_part,
    "shares_what_an_overlay_keeps": share_the_local_part_under_an_overlay,
    "sends_nan": after(spoil_update),
    "measures_nan": after(spoil_metric),
    "answers_nan": ends(scored(lambda logits: logits * float("nan"))),
    "sums_the_loss": before(train_on_the_sum),
    "measures_too_few": after(shorten_metric),
    "reports_nothing": lambda method: replace(method, local_update=lambda ctx: None),
    "lanes_without_budgets": ends(lambda ctx: Personalised(ctx.lanes, ctx.net.logits), budgeted=True),
    "spectra_of_a_lane_too_few": ends(few_spectra),
    "answers_one_class_less": ends(scored(lambda logits: logits[..., :-1])),
    "per_budget_without_budgets": train_per_budget,
}
"""Name of the mistake to what makes the right method wrong."""


def entry(name: str) -> MethodEntry:
    """The right method with one mistake, under its name."""

    def build(cfg: FedDpaConfig, r_max: int) -> Method:
        return CHANGES[name](replace(ENTRY.build(cfg, r_max), name=name))

    return replace(ENTRY, name=name, build=build, tiny={**(ENTRY.tiny or {}), "dropout": 0.0})


def right() -> MethodEntry:
    """Without a mistake."""

    def build(cfg: FedDpaConfig, r_max: int) -> Any:
        return replace(ENTRY.build(cfg, r_max), name="right")

    return replace(ENTRY, name="right", build=build)
