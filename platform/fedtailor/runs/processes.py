"""Which process on which machine: an identity that survives reused pids, jumping clocks and containers."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path

import psutil


@lru_cache(maxsize=1)
def machine() -> str:
    """Boot and pid namespace: equal only where equal pids mean the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        # Not Linux: the host's name and its boot time, rounded because clocks are corrected.
        return f"{os.uname().nodename}/{round(psutil.boot_time(), -2)}"


def started(pid: int) -> str | None:
    """When a process started (clock ticks since boot on Linux), or None if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _started_elsewhere(pid)
    # The name in parentheses may hold spaces; fields are counted after it: state is 3, starttime 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _started_elsewhere(pid: int) -> str | None:
    try:
        return str(round(psutil.Process(pid).create_time()))
    except psutil.NoSuchProcess:
        return None
