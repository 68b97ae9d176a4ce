"""What a run was made with: versions, source revision, machine."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

import fedtailor

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "ray",
    "datasets",
    "numpy",
    "pyarrow",
    "safetensors",
    "pandas",
    "deepspeed",
)


def versions() -> dict[str, str]:
    """Python, fedtailor and the installed ones of PACKAGES."""
    found = {"python": platform.python_version(), "fedtailor": fedtailor.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def source() -> dict[str, Any] | None:
    """Git revision of the installed source and whether it was edited; None if it is not a checkout."""
    folder = Path(fedtailor.__file__).parent
    # An installed copy may lie inside somebody else's repository.
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    sha = _git(folder, "rev-parse", "HEAD")
    return None if sha is None else {"sha": sha, "dirty": bool(_git(folder, "status", "--porcelain"))}


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory in bytes, GPU names and their memory in bytes."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": psutil.virtual_memory().total,
        "gpus": [{"name": gpu.name, "memory": gpu.total_memory} for gpu in gpus],
        "system": platform.platform(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
