"""Is this machine fit for a run? Versions, memory, storage, data, Ray's exposure, W&B, with what to do."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex

import psutil  # type: ignore[import-untyped,unused-ignore]
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.cli.doctor_ray import Finding, Level, examine_ray
from fedtailor.core.errors import StorageError
from fedtailor.storage.files import Storage

PACKAGES = {
    "ray": "2.54", "torch": "2.10", "deepspeed": "", "transformers": "", "peft": "", "datasets": "",
    "wandb": "", "pydantic": "2.10",
}  # fmt: skip
"""Package to the least version; ray below 2.54 lets anybody use the dashboard's DELETE (CVE-2026-27482)."""

OPTIONAL = frozenset({"deepspeed", "wandb"})

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

LEAST_DISK_GB, LEAST_MEMORY_GB = 2.0, 2.0


def examine(storage: str, address: str | None = None) -> list[Finding]:
    """Looks at everything; changes nothing but a small file in ``storage`` that is deleted again.

    Args:
        storage: where runs would be kept.
        address: Ray cluster that would be joined; default: $RAY_ADDRESS.
    """
    checks: list[Callable[[], list[Finding]]] = [
        _python, _packages, _machine, _gpus, lambda: _storage(storage), _data, _threads,
        lambda: examine_ray(address or os.environ.get("RAY_ADDRESS")), _wandb,
    ]  # fmt: skip
    return [finding for check in checks for finding in check()]


def show_findings(console: Console, findings: list[Finding]) -> bool:
    """Prints the list; True if nothing failed."""
    marks = {"ok": "[green]✓[/]", "note": "[yellow]•[/]", "fail": "[bold red]✗[/]"}
    grid = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        grid.add_row(marks[finding.level], finding.what, escape(finding.text))
    console.print(grid)
    failed = sum(finding.level == "fail" for finding in findings)
    console.print(f"[bold red]{failed} failed[/]" if failed else "[green]ready[/]")
    return not failed


def _python() -> list[Finding]:
    found = ".".join(map(str, sys.version_info[:3]))
    return [Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", f"{found} (3.11 or newer)")]


def _packages() -> list[Finding]:
    return [_package(name, least) for name, least in PACKAGES.items()]


def _package(name: str, least: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        return Finding(name, "note" if name in OPTIONAL else "fail", "not installed")
    if least and Version(found) < Version(least):
        return Finding(name, "fail", f"{found}: {least} or newer is needed; pip install -U {name}")
    return Finding(name, "ok", found)


def _machine() -> list[Finding]:
    memory = psutil.virtual_memory()
    free, total = memory.available / 1e9, memory.total / 1e9
    level: Level = "ok" if free >= LEAST_MEMORY_GB else "fail"
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding("cpu", "ok", f"{usable} of {os.cpu_count()} usable"),
        Finding("memory", level, f"{free:.1f} of {total:.1f} GB free (at least {LEAST_MEMORY_GB:g})"),
    ]


def _gpus() -> list[Finding]:
    import torch

    if not torch.cuda.is_available():
        return [Finding("gpu", "note", "none that torch can use; runs go on the CPU")]
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [Finding("gpu", "ok", ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.1f} GB" for gpu in found))]


def _storage(url: str) -> list[Finding]:
    try:
        storage = Storage(url)
        existed = not storage.is_local or storage.local_path().exists()
        name = f".doctor-{token_hex(4)}"
        try:
            storage.write_bytes(f"{name}/a", b"written and flushed")
            storage.move(f"{name}/a", f"{name}/b")
            if storage.read_bytes(f"{name}/b") != b"written and flushed":
                return [Finding("storage", "fail", f"{url}: a file reads back differently")]
        finally:
            storage.delete(name)
            if not existed and storage.local_path().exists():
                storage.local_path().rmdir()
    except (StorageError, OSError) as error:
        return [Finding("storage", "fail", str(error))]
    findings = [Finding("storage", "ok", f"{url}: write, flush, rename and read work")]
    if storage.is_local:
        free = shutil.disk_usage(_nearest(storage.local_path())).free / 1e9
        level: Level = "ok" if free >= LEAST_DISK_GB else "fail"
        findings.append(Finding("disk", level, f"{free:.1f} GB free (at least {LEAST_DISK_GB:g})"))
    return findings


def _nearest(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _data() -> list[Finding]:
    folder = os.environ.get("FEDTAILOR_DATA")
    if not folder:
        return [Finding("data", "note", "FEDTAILOR_DATA is not set: all tasks but cldr need task.path or the hub")]
    if not Path(folder).is_dir():
        return [Finding("data", "fail", f"FEDTAILOR_DATA={folder} is not a folder")]
    held = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    return [Finding("data", "ok", f"FEDTAILOR_DATA={folder}: {', '.join(held) or 'empty'}")]


def _threads() -> list[Finding]:
    import torch

    pinned = {name: os.environ[name] for name in THREADS if name in os.environ}
    told = ", ".join(f"{name}={value}" for name, value in pinned.items()) or "not pinned"
    text = f"{told}; torch would use {torch.get_num_threads()}. Workers are pinned to engine.threads"
    return [Finding("threads", "ok" if pinned else "note", text)]


def _wandb() -> list[Finding]:
    from fedtailor.tracking.wandb_key import KEY, KEY_FILE

    held = next((name for name in (KEY, KEY_FILE) if os.environ.get(name)), None)
    text = f"a key is given by {held}" if held else f"no {KEY} or {KEY_FILE}: wandb.mode offline and disabled work"
    return [Finding("W&B", "ok" if held else "note", text)]
