"""Ranks that differ from client to client: given by formula, drawn, listed, or the budget of a run.

A rank is what a client begins with; a method may lower it in its rounds. It says how much of the server's adapter a
client gets, so it is no secret of the client's, and plans show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import model_validator

from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import Named, Positive


class Ranks(Named):
    """Which rank the k-th of M seen clients begins with; an unseen client gets the largest."""

    name: Literal["formula", "drawn", "list", "budget"] = "formula"
    """``formula``: floor(r_min + (r_max - r_min) (k - 1) / M), as in PF2LoRA's experiments (section 6.1.1). ``drawn``:
    uniformly from r_min to r_max, by the run's seed and the client's id. ``list``: ``values``. ``budget``: every client
    the budget r, in a training for each budget."""
    r_min: Positive = 8
    """formula and drawn only; also what a method may lower a rank to."""
    r_max: Positive = 12
    values: tuple[Positive, ...] = ()
    """list only: a rank for each seen client, in the order of their ids."""

    @model_validator(mode="after")
    def _consistent(self) -> Ranks:
        if self.name in ("formula", "drawn") and self.r_min > self.r_max:
            raise ValueError(f"r_min = {self.r_min} is above r_max = {self.r_max} (allowed: 1 ... {self.r_max})")
        if (self.name == "list") != bool(self.values):
            raise ValueError("ranks=list needs 'values', a rank for each seen client, and is alone in using them")
        return self

    @property
    def least(self) -> int:
        """What a rank may be lowered to."""
        return self.r_min if self.name in ("formula", "drawn") else 1

    def largest(self, budget: int) -> int:
        """Rank of the server's adapter, which every client's fits in.

        Args:
            budget: r of the training.
        """
        return {"budget": budget, "list": max(self.values, default=1)}.get(self.name, self.r_max)

    def of(self, client: str, seen: Sequence[str], seed: int, budget: int) -> int:
        """What a client begins with.

        Args:
            client: its id.
            seen: ids of all seen clients, in their order.
            seed: run seed.
            budget: r of the training.

        >>> seen = [f"seen/cola/{k:02d}" for k in range(8)]
        >>> [Ranks(r_min=5).of(client, seen, 42, 8) for client in seen], Ranks().of("unseen/cola/00", seen, 42, 8)
        ([5, 5, 6, 7, 8, 9, 10, 11], 12)
        """
        if self.name == "budget" or client not in seen:
            return self.largest(budget)
        place = seen.index(client)
        if self.name == "list":
            return self.values[place]
        if self.name == "drawn":
            return int(numpy_rng(seed, "ranks", client).integers(self.r_min, self.r_max + 1))
        return self.r_min + (self.r_max - self.r_min) * place // len(seen)

    def problem(self, seen: int) -> str | None:
        """What is wrong with the list, for so many seen clients; None: nothing."""
        if self.name == "list" and len(self.values) != seen:
            return f"{len(self.values)} values for {seen} seen clients (allowed: {seen}, one for each)"
        return None
