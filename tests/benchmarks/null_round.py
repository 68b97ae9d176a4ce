"""Cost of a round without training: sampling, broadcast, calls, sums; ours with metrics and commit."""

from __future__ import annotations

from pathlib import Path
from statistics import median, quantiles
from typing import Any

from measure import HERE, measure, our_path, python
from systems import ACTORS, peers, pfl

COHORTS = (10, 100, 1000)


def null_part(environments: Path, say: Any, quick: bool = False) -> dict[str, Any]:
    """Milliseconds per client of a null round for each system and cohort."""
    env_flower, env_pfl = peers(environments)
    flower = [env_flower.program("python"), str(HERE / "run_flower.py"), "null:{n}", "{out}", str(ACTORS)]
    ours = [python(), str(HERE / "run_null.py"), "{out}"]
    table = [
        ("serial", "fedtailor, serial", [*ours, "serial", "{n}"], our_path(), ""),
        ("ray", f"fedtailor, Ray, {ACTORS} actors", [*ours, f"ray:{ACTORS}", "{n}"], our_path(), ""),
        *[
            (s.key, s.label, [w.replace("{job}", "null:{n}") for w in s.words], {}, s.missing)
            for s in (pfl(env_pfl, n) for n in sorted({1, ACTORS}))
        ],
        ("flower", f"Flower, {ACTORS} actors", flower, {}, env_flower.missing),
    ]
    rows = []
    for key, label, words, variables, missing in table:
        row: dict[str, Any] = {"system": key, "label": label, "missing": missing, "cohorts": {}}
        for clients in () if missing else COHORTS[:2] if quick else COHORTS:
            seen = measure([word.replace("{n}", str(clients)) for word in words], variables)
            if seen.missing:
                row["missing"] = seen.missing
                break
            row["cohorts"][str(clients)] = _cell(seen.round_s[2:], clients)
            say(f"null round, {label}, {clients} clients: {row['cohorts'][str(clients)]['ms_per_client']:.3f} ms each")
        rows.append(row)
    return {"rows": rows}


def _cell(seconds: tuple[float, ...], clients: int) -> dict[str, Any]:
    p90 = quantiles(seconds, n=10)[-1] if len(seconds) > 1 else seconds[0]
    return {
        "ms_per_client": 1e3 * median(seconds) / clients, "p90_ms_per_client": 1e3 * p90 / clients,
        "round_ms": 1e3 * median(seconds), "repeats": len(seconds),
    }  # fmt: skip
