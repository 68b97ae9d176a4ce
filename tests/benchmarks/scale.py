"""Ours against itself: actors, population and cohort, with training, commits and metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from job import write_job
from measure import Measured, measure
from regimes import REGIMES, Regime
from systems import ACTORS, CORES, ours

SMALL = Regime("scale", 64, 2, 8, 8, (1, 2), 50, 100, 41, 4)
POPULATIONS, COHORTS = (100, 1000, 10_000), (10, 100, 1000)


def scale_part(jobs: Path, say: Any, quick: bool = False) -> dict[str, Any]:
    """Raw rows: clients/s against actors, milliseconds per client against population and cohort."""
    few = 1 if quick else None
    return {
        "actors": _actors(jobs, say, REGIMES[: few or 2]),
        "population": _population(jobs, say, POPULATIONS[:few]),
        "cohort": _cohort(jobs, say, COHORTS[:few]),
    }


def _actors(jobs: Path, say: Any, regimes: Sequence[Regime]) -> list[dict[str, Any]]:
    rows = []
    for regime in regimes:
        job = write_job(regime, jobs / regime.name)
        for actors in (n for n in (1, 2, 4, 8) if n <= CORES):
            segment = max(1, regime.cohort // (2 * actors))
            seen = _run(job, f"actors={actors}", f"min_segment={segment}")
            rows.append({"regime": regime.name, "actors": actors, **_cell(seen, regime)})
            say(f"scale: {regime.name}, {actors} actors: {rows[-1].get('clients_per_s', seen.missing)}")
    return rows


def _population(jobs: Path, say: Any, populations: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for population in populations:
        regime = replace(SMALL, population=population)
        seen = _run(write_job(regime, jobs / f"population-{population}"), f"actors={ACTORS}")
        rows.append({"population": population, "cohort": regime.cohort, **_cell(seen, regime)})
        say(f"scale: population {population:,}: {rows[-1].get('ms_per_client', seen.missing)}")
    return rows


def _cohort(jobs: Path, say: Any, cohorts: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for cohort in cohorts:
        regime = replace(SMALL, population=POPULATIONS[-1], cohort=cohort, rounds=41 if cohort <= 100 else 9)
        seen = _run(write_job(regime, jobs / f"cohort-{cohort}"), f"actors={ACTORS}")
        rows.append({"population": regime.population, "cohort": cohort, **_cell(seen, regime)})
        say(f"scale: cohort {cohort:,}: {rows[-1].get('ms_per_client', seen.missing)}")
    return rows


def _run(job: Path, *engine: str) -> Measured:
    system = ours("scale", "", *engine)
    return measure(system.command(job), system.variables)


def _cell(seen: Measured, regime: Regime) -> dict[str, Any]:
    if seen.missing:
        return {"missing": seen.missing}
    timed = seen.round_s[1:]
    return {
        "clients_per_s": regime.cohort / median(timed), "ms_per_client": 1e3 * median(timed) / regime.cohort,
        "round_s": list(seen.round_s), "repeats": len(timed), "peak_mb": seen.peak_mb, "driver_mb": seen.driver_mb,
    }  # fmt: skip
