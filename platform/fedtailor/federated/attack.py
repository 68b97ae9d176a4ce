"""Clients that lie: who they are, and what they send in the place of their update (section ``attack``)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtailor.core.errors import ConfigError, did_you_mean
from fedtailor.core.messages import FloatArray
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import AttackConfig


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
