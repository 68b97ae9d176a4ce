"""The same method in two runs: paired differences over the clients that both runs have.

A client's score is averaged over the seeds for which the two runs have the same clients, told by content. The test
and its correction are those of `fedtailor.report.significance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd

from fedtailor.report.compare_read import Side
from fedtailor.report.compare_tables import Budget, PoolTable
from fedtailor.report.metrics import Measure
from fedtailor.report.names import in_method_order
from fedtailor.report.scores import client_scores
from fedtailor.report.significance import LEVEL, NOT_COMPARED, Pair, holm, paired

_RULE = (
    "Later run minus earlier run, in {phrase} points. Each client's {phrase} is averaged over the seeds for which both "
    "runs have the same clients (the same texts); the difference is then tested over clients with a paired t-test "
    "(two-sided), which takes clients as independent. p-values are Holm-corrected over all pairs of a pool and budget, "
    "methods without a budget by themselves; ▲ better and ▼ worse mark those below {level:g}. The 95 % intervals are "
    "of the single comparisons, without correction. With few seeds this says little on how the runs would fare when "
    "trained anew."
)

COLUMNS = (
    "pool", "budget", "method", "run", "other_run", "seeds", "n_clients", "mean_difference", "standard_error",
    "ci95_low", "ci95_high", "p", "p_holm", "verdict",
)  # fmt: skip

_KEYS = ["pool", "method", "budget", "seed", "client"]


@dataclass(frozen=True)
class RunPair:
    """One method at one budget, None for a method without, in a run against an earlier one.

    Args:
        run: index of the run; ``other``: index of the run before it.
        seeds: that both have with the same clients.
        same: both runs took their results from the same stages, so there is nothing to test.
        result: the comparison; its ``method`` and ``other`` are the method.
    """

    run: int
    other: int
    seeds: tuple[int, ...]
    same: bool
    result: Pair


def rule(measure: Measure) -> str:
    """What the tests are, for readers of a comparison."""
    return _RULE.format(phrase=measure.phrase, level=LEVEL)


def compare_pairs(sides: Sequence[Side], tables: Sequence[PoolTable]) -> tuple[tuple[RunPair, ...], tuple[str, ...]]:
    """All pairs of runs, in order of pool, budget, runs, method; and why a pair of runs has none."""
    scores = [_client_scores(side) for side in sides]
    joined: list[tuple[int, int, tuple[int, ...], pd.DataFrame]] = []
    reasons = []
    for (i, a), (j, b) in combinations(enumerate(sides), 2):
        seeds, why = shared_seeds(a, b)
        if why:
            reasons.append(why)
            continue
        here = scores[i][scores[i]["seed"].isin(seeds)]
        both = here.merge(scores[j], on=_KEYS, suffixes=("_other", ""))
        both = both[~both["method"].isin(NOT_COMPARED)]
        if both.empty:
            reasons.append(f"{a.run_id} and {b.run_id} have no method, budget and client in common: no paired test.")
        joined.append((j, i, seeds, both.assign(gain=both["value"] - both["value_other"])))
    pairs = []
    for pool, budget in [(table.pool, budget) for table in tables for budget in _families(table)]:
        family = [pair for j, i, seeds, both in joined for pair in _pairs(sides, (j, i), seeds, both, pool, budget)]
        pairs += _corrected(family)
    return tuple(pairs), tuple(reasons)


def _families(table: PoolTable) -> tuple[Budget, ...]:
    return tuple(dict.fromkeys((None, *table.budgets)))


def shared_seeds(a: Side, b: Side) -> tuple[tuple[int, ...], str]:
    """Seeds for which two runs have the same clients, or a sentence on why there are none."""
    names = f"{a.run_id} and {b.run_id}"
    common = sorted({int(s) for s in a.values["seed"]} & {int(s) for s in b.values["seed"]})
    if not common:
        return (), f"{names} have no seed in common: no paired test."
    unknown = [side.run_id for side in (a, b) if not any(seed in side.people for seed in common)]
    if unknown:
        which = " and ".join(unknown)
        return (), f"The clients of {which} cannot be told (no data in the storage fits the run): no paired test."
    same = [
        seed
        for seed in common
        if seed in a.people and seed in b.people and a.people[seed].hashes == b.people[seed].hashes
    ]
    return tuple(same), "" if same else f"{names} have different clients (the populations differ): no paired test."


def pairs_csv(sides: Sequence[Side], pairs: Sequence[RunPair]) -> pd.DataFrame:
    """``compare_pairs.csv``: `COLUMNS`; differences are fractions, budget -1 where there is none."""
    rows = [
        (
            p.result.pool, -1 if p.result.budget is None else p.result.budget, p.result.method, sides[p.run].run_id,
            sides[p.other].run_id, " ".join(map(str, p.seeds)), p.result.n_clients, p.result.difference,
            p.result.standard_error, *(p.result.interval or (None, None)), p.result.p, p.result.p_holm,
            "same" if p.same else p.result.verdict,
        )
        for p in pairs
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _client_scores(side: Side) -> pd.DataFrame:
    """As `client_scores`; a method with budgets and a stray row without is taken at its budgets."""
    table = client_scores(side.values)
    largest = table.groupby(["pool", "method"])["budget"].transform("max")
    return table[(table["budget"] >= 0) | (largest < 0)]


def _pairs(
    sides: Sequence[Side], runs: tuple[int, int], seeds: tuple[int, ...], both: pd.DataFrame, pool: str, budget: Budget
) -> list[RunPair]:
    here = both[(both["pool"] == pool) & (both["budget"] == (-1 if budget is None else budget))]
    found = []
    for method in in_method_order(here["method"]):
        gain = here[here["method"] == method].groupby("client")["gain"].mean().to_numpy(np.float64)
        one, other = (_origins(sides[k], method, seeds) for k in runs)
        blank, same = Pair(pool, budget, method, method, len(gain), 0.0, None, None, None), one == other
        found.append(RunPair(*runs, seeds, same, blank if same else paired(blank, gain)))
    return found


def _origins(side: Side, method: str, seeds: Sequence[int]) -> frozenset[str]:
    """Artifacts that hold a method's results; equal names are equal content."""
    stages = side.info["stages"]
    return frozenset(
        str(s["artifact"])
        for s in stages
        if s["kind"] == "personalise" and s["method"] == method and s["seed"] in seeds
    )


def _corrected(family: Sequence[RunPair]) -> list[RunPair]:
    corrected = iter(holm([pair.result.p for pair in family if pair.result.p is not None]))
    return [
        pair if pair.result.p is None else replace(pair, result=replace(pair.result, p_holm=next(corrected)))
        for pair in family
    ]
