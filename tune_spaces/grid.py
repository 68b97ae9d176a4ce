"""What a published search is: a method, the values that were tried, and what decided."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from fedtailor.core.errors import ConfigError

Value = int | float
Space = Mapping[str, tuple[Value, ...]]
"""Dotted key to the values that were tried; the trials are all combinations, the last key fastest."""


@dataclass(frozen=True)
class Grid:
    """One published search.

    Args:
        method: row of the METHODS table; the trials run it alone.
        space: values of every key, all in the method's own section.
        objective: row of `tune_spaces.objective.OBJECTIVES` that decides unless another is named.
        says: what the paper says about the search, in one line, with the place.
    """

    method: str
    space: Space
    objective: str
    says: str


def combinations(space: Space) -> list[dict[str, Value]]:
    """All trials, in a fixed order that numbers them.

    >>> combinations({"a": (1, 2), "b": (3, 4)})[1]
    {'a': 1, 'b': 4}
    """
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def find(address: str, grids: Mapping[str, Grid]) -> Grid:
    """The grid of an address such as ``fedp2eft/lambda_lr``.

    Raises:
        ConfigError: there is none; names the nearest and all that exist.
    """
    if address in grids:
        return grids[address]
    close = difflib.get_close_matches(address, list(grids), n=1, cutoff=0.5)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ConfigError(f"unknown sweep '{address}'{hint} (known: {', '.join(grids)})")
