"""`make bench`: ratios from one run on one machine, written to ``runs/bench/bench.md``. Never part of the tests."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from lanes_speed import lanes_rows
from null_round import null_rows


def matmul_peak(size: int = 1024, repeats: int = 20) -> float:
    """Measured float32 GFLOP/s of one thread: the machine's peak that figures are to be read against."""
    torch.set_num_threads(1)
    a, b = torch.randn(size, size), torch.randn(size, size)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times) / 1e9


def memory_rows() -> list[list[str]]:
    """Peak memory of driver and actors against population, each in a process of its own."""
    rows = []
    for per_language in (10, 625):
        with tempfile.TemporaryDirectory() as folder:
            words = [sys.executable, str(HERE / "population_memory.py"), str(per_language), folder]
            out = subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        found = json.loads(out)
        rows.append(
            [f"{found['clients']:,}", f"{found['driver_mb']:.0f}", f"{found['actor_mb']:.0f}", f"{found['s']:.1f}"]
        )
    return rows


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Runs all and writes the page."""
    parts: list[tuple[str, list[str], Callable[[], list[list[str]]]]] = [
        (
            "Null round (no training): 100 clients, metrics and commit included",
            ["pool", "median ms", "p90 ms"],
            null_rows,
        ),
        ("Overhead-bound training, 64 tokens a step", ["method", "one at a time, s", "lanes, s", "ratio"], lanes_rows),
        ("Memory against population (Ray, 2 actors)", ["clients", "driver MB", "actor MB", "s"], memory_rows),
    ]
    text = [
        "# Benchmarks",
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"torch {torch.__version__}; measured matmul peak of one thread {matmul_peak():.0f} GFLOP/s (float32).",
    ]
    for title, header, measure in parts:
        text += [f"## {title}", table(header, measure())]
        print("\n\n".join(text[-2:]), flush=True)
    out = Path("runs/bench")
    out.mkdir(parents=True, exist_ok=True)
    (out / "bench.md").write_text("\n\n".join(text) + "\n")
    print(f"written to {out / 'bench.md'}")


if __name__ == "__main__":
    main()
