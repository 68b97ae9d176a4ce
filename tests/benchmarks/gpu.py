"""`make bench-gpu`: what a first hour with a GPU should answer, in ten minutes on one card.

Every part runs in a process of its own with a deadline of its own. What it measures is written at once: lines of JSON
in ``gpu.jsonl``, and ``gpu.md``, which grows. A part that fails or is killed at its deadline does not stop the others.
The exit code is 0 if all parts that were asked for succeeded. Weights are random: nothing is downloaded.

``python tests/benchmarks/gpu.py --only lanes-135m,fence`` measures some parts and keeps the others of an earlier page.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE)]

from gpu_page import write_page
from gpu_run import Part, Run, append, earlier, look, play, say
from machine import _cpu
from measure import ROOT

MINUTES, ON_CPU = 10.0, 40.0
"""All deadlines together. On a CPU they are there for what hangs."""
PARTS = (
    Part("peak", "gpu_speed:peak", 35, "What can the card do at most?"),
    Part("equal", "gpu_equal:same", 45, "Does it compute what the CPU computes?"),
    Part("methods", "gpu_equal:methods", 75, "Does every method train and personalise on it?"),
    Part("lanes-encoder", "gpu_speed:lanes", 50, "Lanes on an encoder of MiniLM's shape.", options=("encoder",)),
    Part("lanes-135m", "gpu_speed:lanes", 60, "Lanes on SmolLM2-135M's shape.", options=("135M",)),
    Part("lanes-1b", "gpu_speed:lanes", 50, "Lanes on Llama-3.2-1B's shape.", options=("1B",)),
    Part("lanes-3b", "gpu_speed:lanes", 45, "Lanes on Llama-3.2-3B's shape.", options=("3B",)),
    Part("graphs", "gpu_speed:graphs", 80, "What do CUDA graphs and compiled blocks add to an eager step?"),
    Part("fence", "gpu_memory:fence", 45, "Does a worker with a fraction of the memory stay inside it?", True),
    Part("shares", "gpu_shares:shares", 45, "Several processes on one card, against lanes in one process."),
    Part("ray", "gpu_ray:ray", 45, "Ray actors with fractions of a card, against one process."),
    Part("zero", "gpu_ray:zero", 25, "A base that DeepSpeed ZeRO-3 holds, against a plain one."),
)
"""In order: what needs torch alone first, Ray and DeepSpeed last. The seconds add up to ten minutes."""


def main(words: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Plays the parts asked for, one after the other; the exit code."""
    asked = _arguments(words, parts)
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "gpu.jsonl"
    head = _head(asked, [sys.argv[0], *sys.argv[1:]] if words is None else ["gpu.py", *words])
    if asked.device == "cuda" and not head["cards"]:
        reason = head["error"] or f"torch {head['versions'].get('torch')} sees no card"
        print(f"--device cuda: {reason}; --device cpu runs what does not need one", file=sys.stderr)
        return 2
    kept = earlier(results, head, [part.name for part in asked.parts])
    results.unlink(missing_ok=True)
    for line in (head, *kept):
        append(results, line)

    def grown() -> None:
        write_page(results, parts)

    run, failed = Run(asked.out, asked.device, asked.quick, asked.minutes / MINUTES, grown), []
    grown()
    for part in asked.parts:
        say(f"{part.name}: {part.asks}")
        started = time.monotonic()
        good = play(part, run)
        say(f"{part.name}: {_ended(results)} ({time.monotonic() - started:.0f} s)")
        failed += [] if good else [part.name]
    print(f"\n{results.with_suffix('.md').read_text('utf-8')}")
    say(f"written to {results.with_suffix('.md')} and {results.name}")
    if failed:
        say(f"without success: {', '.join(failed)}")
    return 1 if failed else 0


def _head(asked: argparse.Namespace, words: Sequence[str]) -> dict[str, Any]:
    """What is measured, and on what."""
    seen = look(asked.device)
    names = ("torch", "transformers", "ray", "deepspeed", "numpy")
    versions = {}
    for name in names:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    command = shlex.join(["python", "tests/benchmarks/gpu.py", *words[1:]])
    return {
        "device": asked.device, "quick": asked.quick, "cards": seen["cards"], "cuda": seen.get("cuda"),
        "error": seen["error"], "driver": _driver() if asked.device == "cuda" else "", "cpu": _cpu(),
        "versions": versions, "command": command, "when": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def _driver() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        words = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        text = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
        return text.splitlines()[0].strip() if text.strip() else ""
    return ""


def _ended(results: Path) -> str:
    import json

    line = json.loads(results.read_text("utf-8").splitlines()[-1])
    return f"{line['status']}: {line['error']}" if line["error"] else str(line["status"])


def _arguments(words: Sequence[str] | None, parts: Sequence[Part]) -> argparse.Namespace:
    names = [part.name for part in parts]
    parser = argparse.ArgumentParser(prog="make bench-gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: see that everything runs")
    parser.add_argument("--quick", action="store_true", help="small shapes; the figures mean nothing")
    parser.add_argument("--only", default="", metavar="PARTS", help=f"of: {','.join(names)}")
    parser.add_argument("--skip", default="", metavar="PARTS", help="e.g. ray,zero, which need more than torch")
    parser.add_argument("--minutes", type=float, help=f"all deadlines together (default: {MINUTES:g}; cpu: {ON_CPU:g})")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "bench-gpu", help="folder of the results")
    found = parser.parse_args(words)
    only, skip = ([name for name in text.split(",") if name] for text in (found.only, found.skip))
    if unknown := [name for name in (*only, *skip) if name not in names]:
        parser.error(f"no part {', '.join(unknown)}; parts: {', '.join(names)}")
    if found.minutes is None:
        found.minutes = ON_CPU if found.device == "cpu" else MINUTES
    if not found.minutes > 0:
        parser.error(f"--minutes {found.minutes:g}: must be above 0")
    found.parts = [part for part in parts if (not only or part.name in only) and part.name not in skip]
    if not found.parts:
        parser.error("--only and --skip leave no part")
    found.out = found.out.resolve()
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the part at work ends with this process
    sys.exit(main())
