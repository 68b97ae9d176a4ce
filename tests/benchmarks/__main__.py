"""`make bench`: every system in one run on one machine, written to ``runs/bench``. Never part of the tests.

``python tests/benchmarks --only peers,null`` measures a part; the page keeps the other parts of an earlier run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")

from figure import draw
from machine import machine
from measure import our_path, python
from null_round import null_part
from page import page
from peers import peers_part
from profile_work import profile_part
from real_work import TYPES, real_part
from scale import scale_part
from start import start_part

Part = Callable[[], dict[str, Any]]
LONG = ("real", "profile")
"""Parts that need the packages with pretrained models and half an hour or more each: measured only if asked for."""


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def lanes_part() -> dict[str, Any]:
    """One client at a time against lanes, in a process of its own."""
    words = [python(), str(HERE / "lanes_speed.py")]
    out = subprocess.run(words, env={**os.environ, **our_path()}, check=True, capture_output=True, text=True).stdout
    return {"rows": json.loads(out.splitlines()[-1])}


def flops_part(quick: bool) -> dict[str, Any]:
    """Operations of a round, counted in a process of its own."""
    words = [python(), str(HERE / "flops.py"), *["--quick"] * quick]
    out = subprocess.run(words, env={**os.environ, **our_path()}, check=True, capture_output=True, text=True).stdout
    return {"rows": json.loads(out.splitlines()[-1])}


def memory_part() -> dict[str, Any]:
    """Peak memory of driver and actors against population, each in a process of its own."""
    rows = []
    for per_language in (10, 625):
        with tempfile.TemporaryDirectory() as folder:
            words = [python(), str(HERE / "population_memory.py"), str(per_language), folder]
            done = subprocess.run(words, env={**os.environ, **our_path()}, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(
            [f"{found['clients']:,}", f"{found['driver_mb']:.0f}", f"{found['actor_mb']:.0f}", f"{found['s']:.1f}"]
        )
        say(f"memory: {rows[-1]}")
    return {"rows": rows}


def main() -> None:
    """Measures the parts asked for and writes page, raw numbers and figure after each, of long ones after each row."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        jobs = Path(folder)
        parts: dict[str, Part] = {
            "peers": lambda: peers_part(jobs, chosen.out / "env", say, chosen.regimes, chosen.quick),
            "null": lambda: null_part(chosen.out / "env", say, chosen.quick),
            "scale": lambda: scale_part(jobs, say, chosen.quick),
            "start": lambda: start_part(jobs, say, chosen.quick),
            "lanes": lanes_part,
            "memory": memory_part,
            "flops": lambda: flops_part(chosen.quick),
            "real": lambda: real_part(say, partial(keep, "real"), chosen.quick, chosen.dtypes),
            "profile": lambda: profile_part(say, partial(keep, "profile"), chosen.quick, chosen.dtypes),
        }
        chosen = _arguments(list(parts))
        out = chosen.out
        out.mkdir(parents=True, exist_ok=True)
        raw = out / "bench.json"
        results: dict[str, Any] = json.loads(raw.read_text()) if raw.exists() and chosen.partial else {}
        results["machine"] = machine(say)

        def keep(name: str, found: dict[str, Any]) -> None:
            results[name] = found
            raw.write_text(json.dumps(results, indent=1))
            (out / "bench.md").write_text(page(results, draw(results, out)), encoding="utf-8")

        for name in chosen.only:
            started = time.perf_counter()
            keep(name, parts[name]())
            say(f"{name} took {time.perf_counter() - started:.0f} s")
    print((out / "bench.md").read_text(encoding="utf-8"))
    say(f"written to {out}/bench.md, bench.json, bench.png")


def _arguments(parts: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python tests/benchmarks", description=__doc__)
    usual = [part for part in parts if part not in LONG]
    parser.add_argument("--only", default=",".join(usual), help=f"parts, of: {','.join(parts)}")
    parser.add_argument("--regimes", default="", help="of the part peers, e.g. overhead-bound,mixed")
    parser.add_argument("--dtypes", default=",".join(TYPES), help="of the parts real and profile, e.g. float32")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench", help="folder of results and environments")
    parser.add_argument("--quick", action="store_true", help="see that everything runs; the figures mean nothing")
    found = parser.parse_args()
    found.out = found.out.resolve()
    found.only, found.dtypes = found.only.split(","), found.dtypes.split(",")
    found.regimes = [name for name in found.regimes.split(",") if name]
    for what, given, known in (("part", found.only, parts), ("type", found.dtypes, TYPES)):
        if unknown := set(given) - set(known):
            parser.error(f"no {what} {', '.join(sorted(unknown))}; {what}s: {', '.join(known)}")
    found.partial = set(found.only) != set(parts)
    return found


if __name__ == "__main__":
    main()
