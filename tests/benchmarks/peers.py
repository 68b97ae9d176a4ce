"""The federated job of each regime through every system, in one run on one machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from job import write_job
from measure import Measured, measure
from regimes import REGIMES, Regime, flops_per_text
from systems import SILOS, System, systems

Say = Callable[[str], None]


def peers_part(
    jobs: Path, environments: Path, say: Say, names: Sequence[str] = (), quick: bool = False
) -> dict[str, Any]:
    """Raw rows of all regimes.

    Args:
        jobs: scratch folder.
        environments: where the peers' environments are.
        say: progress.
        names: regimes to measure; all by default.
        quick: too few clients and rounds for a figure that means something.
    """
    found = []
    for regime in REGIMES:
        if names and regime.name not in names:
            continue
        played = regime.quick() if quick else regime
        found.append({"regime": played.as_json(), "rows": _regime(played, jobs, environments, say)})
    return {"regimes": found}


def _regime(regime: Regime, jobs: Path, environments: Path, say: Say) -> list[dict[str, Any]]:
    whole = write_job(regime, jobs / regime.name)
    same = regime.cohort == SILOS
    small_regime = regime if same else regime.with_cohort(SILOS, min(4, regime.rounds))
    small = whole if same else write_job(small_regime, jobs / f"{regime.name}-silos")
    rows = []
    table = systems(regime, environments)
    reference = measure(table[0].command(whole), table[0].variables)
    small_reference = reference if same else measure(table[0].command(small), table[0].variables)
    for system in table:
        on, job = (small_regime, small) if system.silos else (regime, whole)
        if system is table[0]:
            seen = reference
        elif system.missing:
            seen = Measured(missing=system.missing)
        else:
            seen = measure(system.command(job), system.variables)
        row = _row(system, on, job, seen, small_reference if system.silos else reference)
        rows.append(row)
        say(f"{regime.name}: {system.label}: " + (seen.missing or f"{row['clients_per_s']:.1f} clients/s"))
    return rows


def _row(system: System, regime: Regime, job: Path, seen: Measured, reference: Measured) -> dict[str, Any]:
    row: dict[str, Any] = {"system": system.key, "label": system.label, "dtype": system.dtype, "missing": seen.missing}
    if seen.missing:
        return row
    rounds, clients = np.load(job / "rounds.npz"), np.load(job / "clients.npz")
    texts = clients["sizes"][rounds["cohorts"]].sum(1)
    timed = seen.round_s[1:]
    rates = [regime.cohort / s for s in timed]
    row |= {
        "clients_per_s": median(rates), "slowest": min(rates), "fastest": max(rates), "repeats": len(timed),
        "round_s": list(seen.round_s), "loss": seen.loss, "first_step_s": seen.first_step_s, "peak_mb": seen.peak_mb,
        "flops_per_s": flops_per_text(regime) * median([n / s for n, s in zip(texts[1:], timed, strict=True)]),
    }  # fmt: skip
    if seen.final is not None and reference.final is not None:
        travelled = np.linalg.norm(reference.final - rounds["initial"])
        row["parity"] = float(np.linalg.norm(seen.final - reference.final) / travelled)
    return row
