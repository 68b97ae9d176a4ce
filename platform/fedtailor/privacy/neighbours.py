"""Who shares masks and secret shares with whom in one round of secure aggregation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import ceil, log2
from types import MappingProxyType

from fedtailor.core.seeding import numpy_rng


def degree(clients: int, neighbours: int | None, complete: bool) -> int:
    """Neighbours of each client: all others (Bonawitz et al.), or an even number of them (Bell et al.).

    Without a number it is 2 ceil(log2 n), the order of growth that Bell et al. prove. Their constants depend on how
    many clients collude and vanish; take them from their Theorem 3.10 for a deployment.

    >>> degree(100, None, False), degree(100, None, True), degree(5, None, False), degree(100, 7, False)
    (14, 99, 4, 8)
    """
    wanted = 2 * ceil(log2(max(clients, 2))) if neighbours is None else neighbours
    even = wanted + wanted % 2
    return clients - 1 if complete or even >= clients - 1 else even


@lru_cache(maxsize=64)
def graph(cohort: tuple[str, ...], degree: int, seed: int, kind: str, round: int) -> Mapping[str, tuple[str, ...]]:
    """Every client's neighbours, symmetric: a ring in random order, each tied to the nearest ones on both sides."""
    count = len(cohort)
    if degree >= count - 1:
        return MappingProxyType({me: tuple(other for other in cohort if other != me) for me in cohort})
    ring = [cohort[i] for i in numpy_rng(seed, kind, round, "secagg-graph").permutation(count)]
    steps = [*range(-degree // 2, 0), *range(1, degree // 2 + 1)]
    return MappingProxyType({me: tuple(ring[(at + s) % count] for s in steps) for at, me in enumerate(ring)})
