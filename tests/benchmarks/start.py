"""What comes before the first training step: a worker's CPU time, the way there, the commands without torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from job import write_job
from measure import HERE, measure, our_path, peer_variables, python
from regimes import REGIMES
from systems import ACTORS, ours

REPEATS = 3
WORKER = """
import json, sys, time
from pathlib import Path
from actors.client_actor import ActorSetup, ClientActor
actor = ClientActor(ActorSetup("fedtailor.worker.worker:Worker", 1, {}))
actor.load()
ready = time.process_time()
from job import stage_spec
from regimes import REGIMES
from fedtailor.core.settings import EngineConfig
spec, began = stage_spec(REGIMES[0].quick(), Path(sys.argv[1]), EngineConfig()), time.process_time()
actor.open(spec)
print(json.dumps([ready, ready + time.process_time() - began]))
"""
"""A worker's process without Ray's cluster around it: CPU seconds until it waits for a stage, and until one is open."""

COMMANDS = (("--help",), ("status",), ("report", "--help"))


def start_part(jobs: Path, say: Any, quick: bool = False) -> dict[str, Any]:
    """Rows of name, median, least and most of `REPEATS` runs, unit."""
    job = write_job(REGIMES[0].quick(), jobs / "start")
    repeats = range(1 if quick else REPEATS)
    found = [_worker(job) for _ in repeats]
    rows = [
        _row("a worker waits for a stage", [ready for ready, _ in found], "s of CPU"),
        _row("a worker has opened one", [opened for _, opened in found], "s of CPU"),
    ]
    for system in (
        ours("serial", "in one process", "backend=serial"),
        ours("ray", f"Ray, {ACTORS} actors", f"actors={ACTORS}"),
    ):
        seen = [measure(system.command(job), system.variables) for _ in repeats]
        if missing := next((one.missing for one in seen if one.missing), ""):
            rows.append([f"first step, {system.label}", missing, "", "", ""])
        else:
            rows.append(_row(f"first step, {system.label}", [one.first_step_s for one in seen], "s"))
    for words in COMMANDS:
        rows.append(_row(f"fedtailor {' '.join(words)}", [_command(words, jobs) for _ in repeats], "s of CPU"))
    for row in rows:
        say(f"start: {' '.join(row)}")
    return {"rows": rows, "load": os.getloadavg()[0]}


def _row(name: str, values: Sequence[float], unit: str) -> list[str]:
    return [name, f"{median(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}", unit]


def _environment() -> dict[str, str]:
    return {**os.environ, **peer_variables(), **our_path()}


def _worker(job: Path) -> tuple[float, float]:
    words = [python(), "-c", WORKER, str(job)]
    out = subprocess.run(words, env=_environment(), check=True, capture_output=True, text=True, cwd=HERE).stdout
    ready, opened = json.loads(out.splitlines()[-1])
    return ready, opened


def _command(words: Sequence[str], folder: Path) -> float:
    """CPU seconds of a command of ours."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [python(), "-m", "fedtailor", *words], env=_environment(), check=True, capture_output=True, cwd=folder
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
