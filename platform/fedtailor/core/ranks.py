"""Several processes that hold one model together and train one client: what the maths needs to know of them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Ranks(Protocol):
    """This process among those that hold the model.

    All of them run the same client function on the same client. Each has its own rows of every step (see
    `core.batches.micro_batches`); gradients are summed before the optimizer, which does the same everywhere.
    """

    @property
    def index(self) -> int:
        """0 to size - 1."""

    @property
    def size(self) -> int:
        """How many there are."""

    def sum_(self, tensor: Tensor) -> None:
        """Replaces ``tensor`` by its sum over all of them, in place; the same bytes everywhere."""
