"""Ownership: every parameter has exactly one scope, and the platform moves state by it alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod


class Scope(Enum):
    """Who owns a parameter and how long it lives."""

    FROZEN = "frozen"
    """Base weights: loaded once per worker, never sent."""
    SHARED = "shared"
    """Broadcast before a local update and uploaded after it."""
    PRIVATE = "private"
    """Stays with the client between rounds; stored by the platform."""
    EPHEMERAL = "ephemeral"
    """Lives for one call."""


@dataclass(frozen=True)
class ParamSpec:
    """Name, shape (without the lane axis) and owner of one trainable tensor."""

    name: str
    shape: tuple[int, ...]
    scope: Scope

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)
