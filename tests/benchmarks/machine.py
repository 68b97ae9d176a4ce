"""What the figures were measured on, and the peak that they are read against."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

_PEAK = """
import sys, time, torch
threads, kind = int(sys.argv[1]), getattr(torch, sys.argv[2])
torch.set_num_threads(threads)
a, b = (torch.randn(1024, 1024).to(kind) for _ in range(2))
times = []
end = time.perf_counter() + 2.0
while time.perf_counter() < end:
    start = time.perf_counter()
    a @ b
    times.append(time.perf_counter() - start)
print(2 * 1024**3 / min(times))
"""


def machine(say: Any) -> dict[str, Any]:
    """CPU, memory, versions, load before the run, and measured peaks of a matrix product in FLOP/s."""
    cores = os.cpu_count() or 1
    peaks = {
        kind: {str(threads): _peak(threads, kind) for threads in sorted({1, cores})} for kind in ("float32", "bfloat16")
    }
    say(f"matmul peak: {peaks}")
    names = ("torch", "transformers", "ray", "numpy")
    return {
        "cpu": _cpu(), "cores": cores, "memory_gb": psutil.virtual_memory().total / 1e9, "system": platform.platform(),
        "python": platform.python_version(), "versions": {name: version(name) for name in names}, "peaks": peaks,
        "load": os.getloadavg()[0], "when": time.strftime("%Y-%m-%d %H:%M"),
    }  # fmt: skip


def _peak(threads: int, kind: str) -> float:
    """In a process of its own: the number of threads cannot be changed safely later."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, "-c", _PEAK, str(threads), kind]
    return float(subprocess.run(words, env=variables, check=True, capture_output=True, text=True).stdout)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {name.strip(): value.strip() for name, value in fields.items()}
    wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in known.get("flags", "").split()]
    family = f" (family {known['cpu family']}, model {known['model']})" if "cpu family" in known else ""
    name = known.get("model name") or platform.processor() or platform.machine()
    return f"{name}{family}{', ' if wide else ''}{', '.join(wide)}"
