"""A method is a value: a frozen record of the seams. Nothing here knows where it runs.

`run_rounds` is the only loop over rounds and no method's name occurs in it; a method is what it labels SHARED,
PRIVATE or EPHEMERAL, plus one client function.
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

from fedtailor.core.early_stop import EarlyStop
from fedtailor.core.release import Masking, Release
from fedtailor.core.scope import ParamSpec

if TYPE_CHECKING:
    from fedtailor.core.batches import LaneBatch
    from fedtailor.core.context import ClientContext, Lane
    from fedtailor.core.lanes import LaneParams
    from fedtailor.core.net import LaneNet

Row = npt.NDArray[np.float32]


class Capability(Enum):
    """What a method may need from the engine."""

    SECOND_ORDER = "second_order"
    """Gradients of gradients: not under ZeRO, and attention by kernels that have a second derivative."""
    CLASSES = "classes"
    """A task that asks for one class per text."""


class Parameters(Protocol):
    """A set of trained parameters: declares them and gives their initial values."""

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Names, shapes and scopes."""

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Initial values without lane axis; equal on every worker."""


class Adapter(Parameters, Protocol):
    """Parameters that change what the model computes."""

    @property
    def lanes(self) -> bool:
        """False: one client at a time."""

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Makes the model compute with ``params``."""


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
        epochs: passes over the local data of ``local_update``, for estimates.
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
    one_lane: bool = False
    per_budget: bool = False
    early_stop: EarlyStop | None = None
    overlay: Overlay | None = None
    bound: float = math.inf
    alarm: float = 0.0
    masking: Masking | None = None
    release: Release | None = None

    @property
    def lanes(self) -> bool:
        """Whether clients may share a forward pass."""
        return not self.one_lane and (self.adapter is None or self.adapter.lanes)
