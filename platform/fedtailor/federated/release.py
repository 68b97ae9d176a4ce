"""What the server may see of a cohort's sum: masks that hide single rows, noise on what is opened, and its ledger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedtailor.core.messages import Row


@dataclass(frozen=True)
class RoundId:
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
class PrivacySpend:
    """What a release has cost, as the ledger holds it.

    Args:
        number: 0, or more where a round was aggregated again with another sum.
        epsilon: spent by the stage and those before it, this release included; infinite: no guarantee.
        delta: that epsilon belongs to.
    """

    number: int = 0
    epsilon: float = math.inf
    delta: float = 0.0


RecordSpend = Callable[[int, str], PrivacySpend]
"""(round, fingerprint of the sum) to what is spent with this release; durable before it returns."""


def no_ledger(round: int, fingerprint: str) -> PrivacySpend:
    """No ledger: for tests of the arithmetic alone."""
    return PrivacySpend()


@dataclass(frozen=True)
class NoisedAggregate:
    """The consensus (P,) float32 that the server goes on with, and what is told about it."""

    consensus: Row
    metrics: Mapping[str, float] = field(default_factory=dict)
    warnings: Sequence[Mapping[str, Any]] = ()


class ServerMechanism(Protocol):
    """Turns a sum of clipped updates into what the server may see."""

    def fingerprint(self, total: Any) -> str:
        """Equal for equal sums: tells whether a round that is run again releases the same."""

    def __call__(self, total: Any, received: Row, planned: int, round_id: RoundId, draw: int) -> NoisedAggregate:
        """The consensus.

        Args:
            total: sum of the valid clients' rows, or None without any.
            received: what the cohort started from, (P,).
            planned: clients that the round plans with: the denominator, whoever succeeds.
            round_id: coordinates of the noise.
            draw: see `PrivacySpend.number`.
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

    def mask(self, row: Row, received: Row, weight: float, client: str, round_id: RoundId) -> Masked:
        """One client's side."""

    def open(self, total: Any, received: Row, valid: Sequence[str], round_id: RoundId) -> Opened:
        """The server's side.

        Raises:
            RoundError: too many clients vanished.
        """


def still(before: Row, after: Row) -> list[dict[str, Any]]:
    """A warning if a round left every SHARED number where it was."""
    if not before.size or not np.array_equal(before, after):
        return []
    return [{"kind": "unmoved", "reason": "the SHARED parameters did not move in this round"}]
