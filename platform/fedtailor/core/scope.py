"""Who owns a parameter and how long it lives; several processes that own one model together.

Every parameter has exactly one scope, and the platform moves state by it alone. `Ranks` is what the maths needs to
know of the processes that hold a model together and train one client.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import prod
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # a process that waits for its model names scopes before it has torch
    from torch import Tensor


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


class Ranks(Protocol):
    """This process among those that hold the model.

    All of them run the same client function on the same client. Each has its own rows of every step (see
    `lanes.parts.micro_batches`); gradients are summed before the optimizer, which does the same everywhere.
    """

    @property
    def index(self) -> int:
        """0 to size - 1."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> None:
        """Replaces ``tensor`` by its sum over all of them, in place; the same bytes everywhere."""
