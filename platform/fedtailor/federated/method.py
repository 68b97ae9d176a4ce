"""The contract of a method: a frozen record of its parts, which does not know where it runs.

`run_rounds` is the only loop over rounds and no method's name occurs in it; a method is what it labels SHARED,
PRIVATE or EPHEMERAL, plus one client function. How rows are masked and what the server may see of their sum is in
`fedtailor.privacy`; a method without them is summed and used as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from fedtailor.core.config import Config
from fedtailor.core.errors import MethodError
from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec
from fedtailor.federated.context import ClientContext, Lane
from fedtailor.federated.ranks import Ranks
from fedtailor.federated.release import Masking, ServerMechanism
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import Adapter, LaneParams, Parameters

_BEST, _VALUE, _SINCE = "early_stop.best", "early_stop.value", "early_stop.since"
"""An `EarlyStop`'s record in the server's state."""


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
        spectra: singular values of what the client's model adds to a module: its name to (K, R), descending.
        export: adapter files of a lane, or None where there is no adapter.
    """

    lanes: tuple[Lane, ...]
    logits: Callable[[LaneBatch], Tensor]
    ranks: Tensor | None = None
    selects_ranks: bool = False
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    strategy: Mapping[str, Tensor] = field(default_factory=dict)
    spectra: Mapping[str, Tensor] = field(default_factory=dict)
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

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """Writes one client's row, as named tensors, into a plain model's weights: the client's base by itself."""


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


@runtime_checkable
class LaidOut(Protocol):
    """An aggregator that must know where which parameter is in a row."""

    def laid_out(self, specs: Sequence[ParamSpec]) -> Aggregator:
        """The aggregator for rows of SHARED parameters with these specs, in flat order."""


class ServerOptimizer(Protocol):
    """Moves the server's parameters along ``delta = consensus - params``."""

    def init(self, params: Row) -> dict[str, Row]:
        """State before round 0."""

    def step(self, params: Row, delta: Row, state: dict[str, Row]) -> tuple[Row, dict[str, Row]]:
        """New parameters and state; inputs are not changed."""


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


@dataclass(frozen=True)
class Method:
    """The record that `methods/` builds.

    Args:
        name: row of the METHODS table.
        adapter: what is trainable in the model while ``local_update`` runs (None: nothing).
        personaliser: makes the client's model after the rounds.
        local_update: one client's part of a round; None for client-only methods (rounds = 0).
        modules: auxiliary networks with lanes and a scope of their own (PSG, LRNet).
        aggregator: of SHARED parameters; ``server``: what the server does with the consensus.
        downlink: changes in place what each lane was sent, and says how many numbers that are; None: nothing changes.
        ranks: that clients begin with, where they differ; the adapter's is the server's. ``requires``: capabilities.
        batch_size: rows of a training step, from which the lane width follows. ``one_lane``: no forward pass is shared.
        epochs: passes over the local data of ``local_update``, for estimates, as are the three below.
        steps: of ``local_update`` exactly, in the place of ``epochs``.
        passes: work of a step, where a forward pass and a backward pass are 1.
        whole_rows: rows of a lane whose logits are differentiated twice, so must be there at once; 0: none.
        beside: rows that its searches read, at most, by (own rows, the pool's, rounds); a backward pass counts as one.
        search_epochs: passes of ``personaliser`` that serve all budgets; ``budget_epochs``: at each.
        pooled: one client has the rows of all; it takes ``steps`` a round, or a cohort's together (``examples``).
        adapter_is_model: whether what is exported of a client is its whole model; if not, new clients are refused.
        per_budget: one strategy stage per budget, with r_max = budget, instead of one for all.
        validation_pool: it tunes on the validation pool, ``ctx.validation``, whose rows its clients do not train on.
        early_stop: ends the rounds before their number is reached.
        overlay: of a base method, what its PRIVATE state becomes in the stages that build on it.
        bound: largest L2 norm of a client's SHARED update, sent minus received; longer ones are scaled down there.
        norm_alarm: an update longer than so many medians of its cohort is reported; 0: none is.
        masking: hides clients' rows from the server, which then opens their sum only; ``mechanism``: what it may see.
    """

    name: str
    personaliser: Personaliser
    aggregator: Aggregator
    server: ServerOptimizer
    adapter: Adapter | None = None
    local_update: LocalUpdate | None = None
    modules: tuple[Parameters, ...] = ()
    downlink: Callable[[ClientContext], Sequence[int]] | None = None
    ranks: Ranks | None = None
    requires: frozenset[Capability] = frozenset()
    batch_size: int = 32
    epochs: int = 1
    steps: int | None = None
    passes: int = 1
    whole_rows: int = 0
    beside: Callable[[int, int, float], float] | None = None
    search_epochs: int = 0
    budget_epochs: int = 0
    one_lane: bool = False
    pooled: Literal["no", "steps", "examples"] = "no"
    adapter_is_model: bool = True
    per_budget: bool = False
    validation_pool: bool = False
    early_stop: EarlyStop | None = None
    overlay: Overlay | None = None
    bound: float = math.inf
    norm_alarm: float = 0.0
    masking: Masking | None = None
    mechanism: ServerMechanism | None = None

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

    def steps_in(self, cohort: int) -> int:
        """Steps that a client takes in a round of ``cohort`` clients, where they are counted in steps."""
        return (self.steps or 0) * (cohort if self.pooled == "examples" else 1)


@dataclass(frozen=True)
class MethodEntry:
    """How a method is named, configured, built and shown: its row of the METHODS table, beside it in its file.

    Args:
        name: of the method and of its section in the configuration; lower case, an identifier.
        config: its configuration.
        build: (config, largest budget) to `Method`.
        title: its name in tables and figures.
        summary: one line for ``fedtailor list methods``.
        colour: of its marks in figures, ``marker``: as matplotlib writes it; None: one of the spare ones.
        base: whether it may train the base (``base.name``).
        note: a sentence on its configuration (its choices, not its parts) for captions and plans.
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
    note: Callable[[Any], str] | None = None
