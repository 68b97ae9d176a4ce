"""Runs a system in a process of its own and watches it from outside: time to the first step, memory, result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EVERY_S = 0.25
LIMIT_S = 300.0


@dataclass(frozen=True)
class Measured:
    """One run of one system, or why there is none.

    Args:
        round_s: seconds of each round, the first included.
        final: final trained parameters, flat.
        loss: mean training loss of the last round.
        first_step_s: seconds from the start of the process to the first optimizer step.
        peak_mb: most memory of the process and all its descendants: the sum of their resident sets, so pages that
            several share count several times.
        driver_mb: most memory of the process that was started, without descendants; of ours only.
        missing: why there is no result.
    """

    round_s: tuple[float, ...] = ()
    final: np.ndarray | None = None
    loss: float = float("nan")
    first_step_s: float = float("nan")
    peak_mb: float = float("nan")
    driver_mb: float = float("nan")
    missing: str = ""


class _Watch(threading.Thread):
    """Adds up the resident sets of a process tree, four times a second."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._root, self._ended, self.peak = psutil.Process(pid), threading.Event(), 0.0

    def run(self) -> None:
        while not self._ended.wait(EVERY_S):
            total = 0
            with suppress(psutil.Error):
                for process in [self._root, *self._root.children(recursive=True)]:
                    with suppress(psutil.Error):
                        total += process.memory_info().rss
            self.peak = max(self.peak, total / 2**20)

    def end(self) -> float:
        self._ended.set()
        self.join()
        return self.peak


def measure(words: Sequence[str], environment: Mapping[str, str] | None = None) -> Measured:
    """Runs ``words + [OUT]`` placed where ``{out}`` stands; never raises for what the child does."""
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        out, stamp = Path(folder) / "out.json", Path(folder) / "first"
        variables = {**os.environ, **peer_variables(), "BENCH_FIRST_STEP": str(stamp), **(environment or {})}
        started = time.time()
        with open(Path(folder) / "log", "w+") as log:
            child = subprocess.Popen(
                [word.replace("{out}", str(out)) for word in words],
                stdout=log, stderr=subprocess.STDOUT, env=variables, cwd=folder, start_new_session=True,
            )  # fmt: skip
            watch = _Watch(child.pid)
            watch.start()
            problem = _wait(child)
            peak = watch.end()
            log.seek(0)
            tail = log.read()[-1500:]
        if problem or not out.exists():
            return Measured(missing=f"{problem or 'no result'}: {last_line(tail)}")
        found: dict[str, Any] = json.loads(out.read_text())
        first = float(stamp.read_text()) - started if stamp.exists() else float("nan")
        final = np.load(out.with_suffix(".npy"))
        driver = found.get("driver_mb", float("nan"))
        return Measured(tuple(found["round_s"]), final, found["loss"], first, peak, driver)


def peer_variables() -> dict[str, str]:
    """One thread of arithmetic per process unless a program says otherwise, no network, this folder importable."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    quiet = {"HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**threads, **quiet, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(HERE)}


def our_path() -> dict[str, str]:
    """Makes the platform importable for its own runs, not for the peers'."""
    return {"PYTHONPATH": os.pathsep.join([str(HERE), str(ROOT / "platform"), str(ROOT), str(HERE.parent)])}


def python() -> str:
    """The interpreter that the platform runs on."""
    return sys.executable


def last_line(text: str) -> str:
    """What a traceback ends with."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no output"


def _wait(child: subprocess.Popen[bytes]) -> str:
    try:
        code = child.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        _end(child.pid)
        child.wait()
        return f"not finished after {LIMIT_S:.0f} s"
    return "" if code == 0 else f"ended with exit code {code}"


def _end(pid: int) -> None:
    """Kills a process and its descendants, and nothing else."""
    with suppress(psutil.Error):
        root = psutil.Process(pid)
        for process in [*root.children(recursive=True), root]:
            with suppress(psutil.Error):
                process.kill()
