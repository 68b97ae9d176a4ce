"""A client's update on its way to the server: what liars send in its place, how it is clipped, when it is reported.

An update is what a client trained minus what it received. Who lies and how is section ``attack``; the norm is measured
and clipped where the update was trained, and watched by the server.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedtailor.core.errors import ConfigError, did_you_mean
from fedtailor.core.messages import FloatArray, Row
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import AttackConfig

_EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Attack:
    """What liars do to their SHARED parameters.

    Args:
        cfg: section ``attack``, not ``none``.
        liars: ids of those who do it.
    """

    cfg: AttackConfig
    liars: frozenset[str]

    def sent(self, client: str, row: FloatArray, received: FloatArray, *coordinates: int | str) -> FloatArray:
        """What a client sends: its own row if it is honest.

        Args:
            client: id.
            row: SHARED parameters after training, (P,) float32; not changed.
            received: what the client started from, (P,) float32.
            coordinates: seed, stage and round, which name the stream of noise.
        """
        if client not in self.liars:
            return row
        update = np.subtract(row, received, dtype=np.float64)
        if self.cfg.name == "noise":
            noise = numpy_rng(*coordinates, client, "attack").standard_normal(row.size)
            update = noise * (np.linalg.norm(update) / np.linalg.norm(noise))
        factor = (-1 if self.cfg.name == "sign_flip" else 1) * (self.cfg.factor or 1)
        with np.errstate(over="ignore"):  # what float32 cannot hold is Inf, and rejected as such
            return np.asarray(received + factor * update, np.float32)


def attack_of(cfg: AttackConfig, seen: Sequence[str]) -> Attack | None:
    """The attack of a configuration on the clients that there are; None where nobody lies.

    A share is drawn by the hashes of the ids, so that it is the same in every stage and on every worker.

    Args:
        cfg: section ``attack``.
        seen: ids of the clients that cohorts are drawn from.

    Raises:
        ConfigError: ``attack.clients`` names one who is not among them.
    """
    if cfg.name == "none":
        return None
    if cfg.share is None:
        unknown = [client for client in cfg.clients if client not in seen]
        if unknown:
            raise ConfigError([f"'attack.clients': no seen client '{id}'{did_you_mean(id, seen)}" for id in unknown])
        return Attack(cfg, frozenset(cfg.clients))
    drawn = sorted(seen, key=lambda client: hashlib.sha256(client.encode()).digest())
    return Attack(cfg, frozenset(drawn[: round(cfg.share * len(seen))]))


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
