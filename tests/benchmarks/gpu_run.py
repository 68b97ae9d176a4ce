"""Runs each part of `make bench-gpu` in a process of its own, with a deadline, and notes at once how it ended.

Everything is kept as lines of JSON in one file: the parts append what they measured, this process what became of them.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from measure import HERE, last_line, our_path, python

GRACE_S = 20.0
"""Longest wait for the end of a process that was killed."""
LOG_TAIL = 4000
"""Characters of a failed part's output that are kept."""


@dataclass(frozen=True)
class Part:
    """A question to a card.

    Args:
        name: as on the command line.
        target: ``module:function``, called with the `gpu_part.Bench`.
        seconds: its deadline in a run of ten minutes; in another one it has the same share.
        asks: the question.
        needs_card: it means nothing on a CPU.
        options: further arguments of the function.
    """

    name: str
    target: str
    seconds: float
    asks: str
    needs_card: bool = False
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """What all parts of a call have in common.

    Args:
        out: folder of results and logs.
        device: ``cpu`` or ``cuda``.
        quick: shapes so small that the figures mean nothing.
        share: factor on all deadlines.
        grown: called whenever there are new lines.
    """

    out: Path
    device: str
    quick: bool
    share: float
    grown: Callable[[], None]

    @property
    def results(self) -> Path:
        """The file of JSON lines."""
        return self.out / "gpu.jsonl"

    def write(self, line: Mapping[str, Any]) -> None:
        """Appends a line."""
        append(self.results, line)
        self.grown()


def append(file: Path, line: Mapping[str, Any]) -> None:
    """Adds one line of JSON to a file that several processes write to."""
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")


def play(part: Part, run: Run) -> bool:
    """Plays a part to its end or its deadline; whether it succeeded. Never raises for what the part does."""
    if part.needs_card and run.device == "cpu":
        run.write({"part": part.name, "status": "does not apply", "seconds": 0.0, "error": "needs a card"})
        return True
    limit, started = part.seconds * run.share, time.monotonic()
    log = run.out / f"{part.name}.log"
    words = [
        python(), str(HERE / "gpu_part.py"), part.name, part.target, str(run.results), run.device,
        "quick" if run.quick else "whole", f"{limit:.1f}", *part.options,
    ]  # fmt: skip
    with log.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            words, stdout=stream, stderr=subprocess.STDOUT, env=environment(run.device), start_new_session=True
        )
        try:
            code = _wait(child, started + limit, run)
        finally:
            end(child)
    line: dict[str, Any] = {"part": part.name, "status": "ok", "seconds": time.monotonic() - started, "error": ""}
    if code != 0:
        text = log.read_text("utf-8", errors="replace")
        line |= {"status": "failed", "error": _error(code, text), "traceback": text[-LOG_TAIL:]}
    if code is None:
        line |= {"status": "deadline", "error": f"not finished after {limit:.0f} s, killed"}
    run.write(line)
    return code == 0


def environment(device: str) -> dict[str, str]:
    """Variables of a part: the platform importable, no network, one thread of arithmetic, a card only where asked."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_USAGE_STATS_ENABLED": "0"}
    own = our_path()["PYTHONPATH"]
    paths = os.pathsep.join([own, str(HERE.parent / "ray"), *filter(None, [os.environ.get("PYTHONPATH")])])
    found = {"OMP_NUM_THREADS": "1", **os.environ, **quiet, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return found | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})


def end(child: subprocess.Popen[bytes]) -> None:
    """Kills a process with all its descendants, those too whose parent is gone; by their ids, and nothing else."""
    for process in _family(child):
        with suppress(psutil.Error):
            process.kill()
    with suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)


def _family(child: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The process, its descendants, and what is left of the session that it began."""
    found: dict[int, psutil.Process] = {}
    with suppress(psutil.Error):
        root = psutil.Process(child.pid)
        found = {process.pid: process for process in [root, *root.children(recursive=True)]}
    for process in psutil.process_iter():
        with suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == child.pid:
                found.setdefault(process.pid, process)
    return list(found.values())


def _wait(child: subprocess.Popen[bytes], until: float, run: Run) -> int | None:
    """The exit code; None: still at work at the deadline. The page grows meanwhile."""
    size = _size(run.results)
    while (left := until - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(min(0.5, left))
        if (now := _size(run.results)) != size:
            size = now
            run.grown()
    return None


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _error(code: int | None, text: str) -> str:
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}: {last_line(text)}"
    return last_line(text)


def look(device: str) -> dict[str, Any]:
    """What torch sees of the cards, in a process of its own, or why it sees none; nothing is asked on a CPU."""
    if device == "cpu":
        return {"error": "", "cards": [], "cuda": None}
    words = [python(), "-c", _LOOK]
    try:
        done = subprocess.run(words, env=environment(device), capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return {"error": "torch did not say within 120 s what cards it sees", "cards": []}
    if done.returncode:
        return {"error": last_line(done.stderr), "cards": []}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


_LOOK = """
import json, sys, torch
cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"torch": torch.__version__, "cuda": torch.version.cuda, "error": "", "cards": [
    {"name": c.name, "memory": c.total_memory, "capability": f"{c.major}.{c.minor}",
     "processors": c.multi_processor_count} for c in cards]}))
"""


def earlier(file: Path, head: Mapping[str, Any], again: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of an earlier call that still stand: of the same device and size, of parts that are not measured now."""
    if not file.exists():
        return []
    lines = [json.loads(text) for text in file.read_text("utf-8").splitlines() if text.strip()]
    same = ("device", "quick", "cards")
    if not lines or any(lines[0].get(key) != head[key] for key in same):
        return []
    return [line for line in lines[1:] if line["part"] not in again]


def say(text: str) -> None:
    """A line for whoever watches."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True, file=sys.stdout)
