"""The contract of a method: record and protocols.

A method is a value: a frozen record of the seams. Nothing here knows where it runs.

`run_rounds` is the only loop over rounds and no method's name occurs in it; a method is what it labels SHARED,
PRIVATE or EPHEMERAL, plus one client function.

The seams of privacy in a round: how a client's row is masked, how a sum is opened, what is released of it.

Implementations are in `fedtailor.privacy`; a method without them is summed and used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fedtailor.core.config import Config
from fedtailor.core.errors import MethodError
from fedtailor.core.messages import Row
from fedtailor.federated.early_stop import EarlyStop
from fedtailor.lanes.params import Adapter, Parameters

if TYPE_CHECKING:
    from fedtailor.federated.context import ClientContext, Lane
    from fedtailor.lanes.batches import LaneBatch
    from fedtailor.lanes.net import LaneNet
    from fedtailor.lanes.params import LaneParams


@dataclass(frozen=True)
class Site:
    """Coordinates of a round.

    Args:
        seed: run seed.
        stage: stage key, e.g. ``strategy/fedp2eft/seed42``.
        round: from 0.
        cohort: all clients that were sampled, in sampling order.
    """

    seed: int
    stage: str
    round: int
    cohort: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """``base`` or ``strategy``: methods of one kind meet the same cohorts."""
        return self.stage.split("/")[0]

    @property
    def path(self) -> str:
        """The stage key without its seed: tells every release from every other."""
        return self.stage.rpartition("/")[0]


@dataclass(frozen=True)
class Draw:
    """A release that is written down.

    Args:
        number: 0, or more where a round was aggregated again with another sum.
        epsilon: spent by the stage and those before it, this release included; infinite: no guarantee.
        delta: that epsilon belongs to.
    """

    number: int = 0
    epsilon: float = math.inf
    delta: float = 0.0


Spend = Callable[[int, str], Draw]
"""(round, fingerprint of the sum) to the draw; what it says is durable before it returns."""


def unrecorded(round: int, fingerprint: str) -> Draw:
    """No ledger: for tests of the arithmetic alone."""
    return Draw()


@dataclass(frozen=True)
class Released:
    """The consensus (P,) float32 that the server goes on with, and what is told about it."""

    consensus: Row
    metrics: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[Mapping[str, Any]] = ()


class Release(Protocol):
    """Turns a sum of bounded updates into what the server may see."""

    def fingerprint(self, total: Any) -> str:
        """Equal for equal sums: tells whether a round that is run again releases the same."""

    def __call__(self, total: Any, received: Row, planned: int, site: Site, draw: int) -> Released:
        """The consensus.

        Args:
            total: sum of the valid clients' rows, or None without any.
            received: what the cohort started from, (P,).
            planned: clients that the round plans with: the denominator, whoever succeeds.
            site: coordinates of the noise.
            draw: see `Draw.number`.
        """


@dataclass(frozen=True)
class Masked:
    """What a client sends, or None if it vanished; and how many numbers were cut to the range."""

    vector: npt.NDArray[np.unsignedinteger[Any]] | None
    clamped: int = 0


@dataclass(frozen=True)
class Opened:
    """The plain aggregate of masked vectors, in the form that a sum of rows has, and what is told about it."""

    total: Any
    metrics: Mapping[str, float] = field(default_factory=dict)


class Masking(Protocol):
    """Hides single rows in a sum that only the server's protocol opens."""

    def mask(self, row: Row, received: Row, weight: float, client: str, site: Site) -> Masked:
        """One client's side."""

    def open(self, total: Any, received: Row, valid: Sequence[str], site: Site) -> Opened:
        """The server's side.

        Raises:
            RoundError: too many clients vanished.
        """


def still(before: Row, after: Row) -> list[dict[str, Any]]:
    """A warning if a round left every SHARED number where it was."""
    if not before.size or not np.array_equal(before, after):
        return []
    return [{"kind": "unmoved", "reason": "the SHARED parameters did not move in this round"}]


class Capability(Enum):
    """What a method may need from the engine."""

    SECOND_ORDER = "second_order"
    """Gradients of gradients: not under ZeRO, and attention by kernels that have a second derivative."""
    CLASSES = "classes"
    """A task that asks for one class per text."""


@dataclass(frozen=True)
class Report:
    """What a client function measured: metric name to (K,) values, one per lane."""

    metrics: Mapping[str, Tensor] = field(default_factory=dict)


LocalUpdate = Callable[["ClientContext"], Report]
"""Trains ``ctx.params`` in place. Never touches storage, Ray or another client."""


@dataclass(frozen=True)
class Personalised:
    """A group's personalised models, one per lane; lanes are (client, budget) pairs.

    Args:
        lanes: who they are, client-major, budgets ascending.
        logits: class scores (k, b, C) of a batch over the first k lanes.
        ranks: ranks kept, (K, L) int64, for methods that adapt layers.
        selects_ranks: whether ``ranks`` was chosen by the method.
        metrics: name to (K,).
        strategy: lambda of each client before pruning: client id to (L, r_init).
        export: adapter files of a lane, or None where there is no adapter.
    """

    lanes: tuple[Lane, ...]
    logits: Callable[[LaneBatch], Tensor]
    ranks: Tensor | None = None
    selects_ranks: bool = False
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    strategy: Mapping[str, Tensor] = field(default_factory=dict)
    export: Callable[[int, str], dict[str, bytes]] | None = None


class Personaliser(Protocol):
    """Makes ``ctx``'s clients their models."""

    @property
    def budgeted(self) -> bool:
        """Whether budgets change the result; if not, one lane per client is made."""

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Personalises all clients of the group at all budgets of ``ctx.budgets``."""


class Overlay(Parameters, Protocol):
    """What a base keeps per client, frozen in later stages: the client's base is common weights plus this.

    ``specs`` and ``initial`` are those of the base method's PRIVATE parameters, so a client that was never sampled
    falls back to its initial private state.
    """

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Makes row i of ``params`` part of the base of every lane whose ``net.state.overlay_rows`` says i."""

    def merge(self, weights: Mapping[str, Tensor], tensors: Mapping[str, Row]) -> None:
        """Writes one client's row, as named tensors, into plain weights: the client's base as a model of its own."""


class Aggregator(Protocol):
    """Sums clients' SHARED rows over fixed segments of the cohort."""

    @property
    def presum(self) -> bool:
        """Whether a segment may be summed where it ran."""

    def zero(self, size: int) -> Any:
        """The empty state for rows of ``size`` numbers."""

    def add(self, state: Any, row: Row, weight: float) -> Any:
        """The state with one client more."""

    def merge(self, left: Any, right: Any) -> Any:
        """Two states joined, left first."""

    def result(self, state: Any) -> Row:
        """The consensus (P,) float32."""

    def weight(self, state: Any) -> float:
        """Total weight so far; 0 means nothing to aggregate."""


class ServerOptimizer(Protocol):
    """Moves the server's parameters along ``delta = consensus - params``."""

    def init(self, params: Row) -> dict[str, Row]:
        """State before round 0."""

    def step(self, params: Row, delta: Row, state: dict[str, Row]) -> tuple[Row, dict[str, Row]]:
        """New parameters and state; inputs are not changed."""


def as_sent(row: Row, client: str) -> Row:
    """The downlink of most methods: a client is sent what the server has."""
    return row


@dataclass(frozen=True)
class Method:
    """The record that `methods/` builds.

    Args:
        name: row of the METHODS table.
        adapter: what is trainable in the model while ``local_update`` runs (None: nothing).
        personaliser: makes the client's model after the rounds.
        local_update: one client's part of a round; None for client-only methods (rounds = 0).
        modules: auxiliary networks with lanes and a scope of their own (PSG, LRNet).
        aggregator: of SHARED parameters.
        server: server optimizer.
        downlink: what a client is sent.
        requires: capabilities.
        batch_size: rows of a training step, from which the lane width follows.
        epochs: passes over the local data of ``local_update``, for estimates, as are the three below.
        steps: of ``local_update`` exactly, in the place of ``epochs``.
        search_epochs: passes of ``personaliser`` that serve all budgets.
        budget_epochs: passes of ``personaliser`` at each budget.
        one_lane: clients never share a forward pass.
        per_budget: one strategy stage per budget, with r_max = budget, instead of one for all.
        early_stop: ends the rounds before their number is reached.
        overlay: of a base method, what its PRIVATE state becomes in the stages that build on it.
        bound: largest L2 norm of a client's SHARED update (what it sends minus what it received); a longer one is
            scaled down where the client ran, before it is summed. Infinite: nothing is changed.
        alarm: an update longer than so many medians of its cohort is reported; 0: none is.
        masking: hides clients' rows from the server, which then opens their sum only.
        release: what the server may see of the sum.
    """

    name: str
    personaliser: Personaliser
    aggregator: Aggregator
    server: ServerOptimizer
    adapter: Adapter | None = None
    local_update: LocalUpdate | None = None
    modules: tuple[Parameters, ...] = ()
    downlink: Callable[[Row, str], Row] = as_sent
    requires: frozenset[Capability] = frozenset()
    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None
    search_epochs: int = 0
    budget_epochs: int = 0
    one_lane: bool = False
    per_budget: bool = False
    early_stop: EarlyStop | None = None
    overlay: Overlay | None = None
    bound: float = math.inf
    alarm: float = 0.0
    masking: Masking | None = None
    release: Release | None = None

    def __post_init__(self) -> None:
        if self.per_budget and not self.personaliser.budgeted:
            raise MethodError(
                f"method {self.name}: per_budget=True needs a personaliser with budgeted=True, "
                f"{type(self.personaliser).__name__} has budgeted=False: every budget would be trained and none used"
            )

    @property
    def lanes(self) -> bool:
        """Whether clients may share a forward pass."""
        return not self.one_lane and (self.adapter is None or self.adapter.lanes)


@dataclass(frozen=True)
class MethodEntry:
    """How a method is named, configured, built and shown: its row of the METHODS table, beside it in its file.

    Args:
        name: of the method and of its section in the configuration; lower case, an identifier.
        config: its configuration.
        build: (config, largest budget) to `Method`.
        title: its name in tables and figures.
        summary: one line for ``fedtailor list methods``.
        colour: of its marks in figures; None: one of the spare ones.
        marker: as matplotlib writes it; None: one of the spare ones.
        base: whether it may train the base (``base.name``).
        tiny: its section for the contracts: steps that change a toy model, and few of them. None: it has none yet,
            and the contracts say so.
    """

    name: str
    config: type[Config]
    build: Callable[[Any, int], Method]
    title: str
    summary: str
    colour: str | None = None
    marker: str | None = None
    base: bool = False
    tiny: Mapping[str, Any] | None = None
