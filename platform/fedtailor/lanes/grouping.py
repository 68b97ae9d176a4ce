"""Who shares a forward pass, and which clients form a segment: functions of sizes and budgets alone.

Neither the number of workers nor timing enters, so equal configurations give equal groups everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Load:
    """What a client costs: training examples and longest text in tokens."""

    examples: int
    longest: int


def lane_groups(
    loads: Sequence[Load], batch_size: int, lanes_each: int, token_budget: int, max_lanes: int
) -> list[list[int]]:
    """Groups clients of similar size until a fused step would exceed the token budget.

    Args:
        loads: one per client.
        batch_size: rows of a step.
        lanes_each: lanes that one client takes (its budgets).
        token_budget: tokens of one fused step.
        max_lanes: most lanes; at least one client always runs.

    Returns:
        Groups of client indices, each ordered by falling number of examples.

    >>> lane_groups([Load(8, 4), Load(9, 4), Load(8, 4)], 8, 1, 64, 32)
    [[1, 0], [2]]
    """
    order = sorted(range(len(loads)), key=lambda i: (-loads[i].examples, i))
    groups: list[list[int]] = []
    widest = 0
    for i in order:
        tokens = min(batch_size, loads[i].examples) * loads[i].longest
        if groups:
            lanes = (len(groups[-1]) + 1) * lanes_each
            if lanes <= max_lanes and lanes * max(widest, tokens) <= token_budget:
                groups[-1].append(i)
                widest = max(widest, tokens)
                continue
        groups.append([i])
        widest = tokens
    return groups


def segments(clients: Sequence[str], most: int, smallest: int) -> list[tuple[str, ...]]:
    """Cuts a cohort into at most ``most`` neighbouring pieces of nearly equal size, ``smallest`` clients or more each.

    >>> segments(list("abcdefg"), 8, 3)
    [('a', 'b', 'c', 'd'), ('e', 'f', 'g')]
    """
    pieces = max(1, min(most, len(clients) // max(1, smallest)))
    size, extra = divmod(len(clients), pieces)
    cuts, start = [], 0
    for piece in range(pieces):
        stop = start + size + (piece < extra)
        cuts.append(tuple(clients[start:stop]))
        start = stop
    return cuts
