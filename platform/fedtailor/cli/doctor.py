"""Is this machine fit for a run? Versions, memory, storage, data, Ray's exposure, W&B, with what to do.

Whoever reaches Ray's ports runs code, so they need loopback or a token.
"""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import stat
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from secrets import token_hex
from typing import Literal, NamedTuple
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped,unused-ignore]
from packaging.version import Version
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.core.errors import StorageError
from fedtailor.storage.files import Storage
from fedtailor.tracking.wandb_key import KEY, KEY_FILE

PACKAGES = {
    "ray": "2.54", "torch": "2.10", "deepspeed": "", "transformers": "", "peft": "", "datasets": "",
    "wandb": "", "pydantic": "2.10",
}  # fmt: skip
"""Package to the least version; ray below 2.54 lets anybody use the dashboard's DELETE (CVE-2026-27482)."""

OPTIONAL = frozenset({"deepspeed", "wandb"})
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
LEAST_DISK_GB, LEAST_MEMORY_GB = 2.0, 2.0
PORTS = {8265: "dashboard and jobs", 10001: "client", 6379: "head"}
DASHBOARD = 8265
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
MODES = ("token", "disabled")
ASK_S = 3.0
_ADVICE = f"Start Ray with --dashboard-host=127.0.0.1 and {MODE}=token"
Level = Literal["ok", "note", "fail"]
Verdict = tuple[Level, str]


class Finding(NamedTuple):
    """One thing that was looked at; ``fail`` makes `doctor` exit with 1."""

    what: str
    level: Level
    text: str


def examine(storage: str, address: str | None = None) -> list[Finding]:
    """Looks at everything; changes nothing but a small file in ``storage`` that is deleted again.

    Args:
        storage: where runs would be kept.
        address: Ray cluster that would be joined; default: $RAY_ADDRESS.
    """
    here = [Finding("gpu", *_gpu()), *_storage(storage), Finding("data", *_data()), Finding("threads", *_threads())]
    ray = examine_ray(address or os.environ.get("RAY_ADDRESS"))
    return [*_versions(), *_machine(), *here, *ray, Finding("W&B", *_wandb())]


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


def _versions() -> Iterator[Finding]:
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "fail", f"{python} (3.11 or newer)")
    for name, least in PACKAGES.items():
        try:
            there = version(name)
        except PackageNotFoundError:
            yield Finding(name, "note" if name in OPTIONAL else "fail", "not installed")
            continue
        if least and Version(there) < Version(least):
            yield Finding(name, "fail", f"{there}: {least} or newer is needed; pip install -U {name}")
        else:
            yield Finding(name, "ok", there)


def _machine() -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu", "ok", f"{usable} of {os.cpu_count()} usable")
    memory = psutil.virtual_memory()
    yield Finding("memory", *_free(memory.available, LEAST_MEMORY_GB, f" of {memory.total / 1e9:.1f}"))


def _free(count: float, least_gb: float, total: str = "") -> Verdict:
    text = f"{count / 1e9:.1f}{total} GB free (at least {least_gb:g})"
    return "ok" if count >= 1e9 * least_gb else "fail", text


def _gpu() -> Verdict:
    import torch

    if not torch.cuda.is_available():
        return "note", "none that torch can use; runs go on the CPU"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "ok", ", ".join(f"{gpu.name} {gpu.total_memory / 1e9:.1f} GB" for gpu in gpus)


def _storage(url: str) -> Iterator[Finding]:
    name, content = f".doctor-{token_hex(4)}", b"written and flushed"
    try:
        storage = Storage(url)
        existed = not storage.is_local or storage.local_path().exists()
        try:
            storage.write_bytes(f"{name}/a", content)
            storage.move(f"{name}/a", f"{name}/b")
            same = storage.read_bytes(f"{name}/b") == content
        finally:
            storage.delete(name)
            if not existed and storage.local_path().exists():
                storage.local_path().rmdir()
    except (StorageError, OSError) as error:
        yield Finding("storage", "fail", str(error))
        return
    if not same:
        yield Finding("storage", "fail", f"{url}: a file reads back differently")
        return
    yield Finding("storage", "ok", f"{url}: write, flush, rename and read work")
    if storage.is_local:
        path = storage.local_path().absolute()
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        yield Finding("disk", *_free(shutil.disk_usage(nearest).free, LEAST_DISK_GB))


def _data() -> Verdict:
    folder = os.environ.get("FEDTAILOR_DATA")
    if not folder:
        return "note", "FEDTAILOR_DATA is not set: all tasks but cldr need task.path or the hub"
    if not Path(folder).is_dir():
        return "fail", f"FEDTAILOR_DATA={folder} is not a folder"
    held = sorted(path.name for path in Path(folder).iterdir() if path.is_dir())
    return "ok", f"FEDTAILOR_DATA={folder}: {', '.join(held) or 'empty'}"


def _threads() -> Verdict:
    import torch

    pinned = ", ".join(f"{name}={os.environ[name]}" for name in THREADS if name in os.environ)
    text = f"{pinned or 'not pinned'}; torch would use {torch.get_num_threads()}. Workers are pinned to engine.threads"
    return "ok" if pinned else "note", text


def _wandb() -> Verdict:
    if held := next((name for name in (KEY, KEY_FILE) if os.environ.get(name)), None):
        return "ok", f"a key is given by {held}"
    return "note", f"no {KEY} or {KEY_FILE}: wandb.mode offline and disabled work"


def examine_ray(address: str | None) -> list[Finding]:
    """Looks at the ports of this machine, at the token, and at the cluster that would be joined.

    Args:
        address: as ``engine.address``, or a dashboard's ``http://host:port``; None or ``auto``: of this machine.
    """
    mode = os.environ.get(MODE)
    # Ray asks for tokens where it is told to, and by itself where there is one.
    tokens = mode.lower() == "token" if mode else bool(os.environ.get(TOKEN)) or os.path.isfile(_token_path())
    verdicts: list[tuple[str, Verdict | None]] = []
    if address is None or address in ("", "auto", "local"):
        verdicts.append(("ray dashboard", _dashboard(f"http://127.0.0.1:{DASHBOARD}", loopback=True)))
    else:
        verdicts += _joined(address, tokens)
    verdicts.append(("ray token", _token(mode or "")))
    open_ports = [port for port in PORTS if port in _beyond_loopback()]
    safe: Verdict = ("ok", "no Ray port listens beyond loopback; local runs bind to 127.0.0.1")
    verdicts += [("ray exposure", _exposure(port, tokens)) for port in open_ports] or [("ray exposure", safe)]
    return [Finding(what, *verdict) for what, verdict in verdicts if verdict is not None]


def _token_path() -> Path:
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _beyond_loopback() -> set[int]:
    """Ports of this machine at which something listens at an address that is not loopback."""
    listening = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr]
    addresses = [(place.port, ipaddress.ip_address(place.ip)) for place in listening]
    return {port for port, ip in addresses if not (getattr(ip, "ipv4_mapped", None) or ip).is_loopback}


def _exposure(port: int, tokens: bool) -> Verdict:
    name = f"{PORTS[port]} port {port}"
    if port == DASHBOARD and (status := _status(f"http://127.0.0.1:{port}")) is not None:
        tokens = tokens and status in (401, 403)
    if not tokens:
        return "fail", f"{name} listens beyond loopback without tokens: whoever reaches it runs code here. {_ADVICE}"
    own = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    if public := [text for text in own if _is_public(text.partition("%")[0])]:
        return "fail", f"{name} listens at a public address ({', '.join(public)}), with unencrypted tokens. {_ADVICE}"
    return "note", f"{name} listens beyond loopback, with unencrypted tokens"


def _is_public(text: str) -> bool:
    """Whether the whole internet can route to an address."""
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False  # a hardware address


def _joined(address: str, tokens: bool) -> list[tuple[str, Verdict | None]]:
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        ip = ipaddress.ip_address(socket.gethostbyname(parts.hostname or ""))
    except OSError as error:
        return [("ray address", ("fail", f"{address}: the host cannot be resolved ({error})"))]
    if ip.is_global:
        return [("ray address", ("fail", f"{address} is a public address ({ip}); use a private network"))]
    found: Verdict = ("ok", f"{address} ({'token' if tokens else 'loopback'})")
    if not ip.is_loopback and not tokens:
        found = ("fail", f"{address} is joined without tokens; set {MODE}=token")
    web = parts.scheme.startswith("http")
    url = f"{parts.scheme if web else 'http'}://{parts.hostname}:{parts.port if web and parts.port else DASHBOARD}"
    return [("ray address", found), ("ray dashboard", _dashboard(url, ip.is_loopback))]


def _dashboard(url: str, loopback: bool) -> Verdict | None:
    """Whether a dashboard answers somebody who shows no token; None if there is no dashboard."""
    status = _status(url)
    if status in (None, 401, 403):
        return ("ok", f"{url} wants a token") if status else None
    if status != 200:
        return "note", f"{url} answers with HTTP {status}: is this a Ray dashboard?"
    if loopback:
        return "note", f"{url} answers without a token: all users of this machine can run code. Set {MODE}=token"
    return "fail", f"{url} answers without a token: whoever reaches it runs code there. {_ADVICE}"


def _status(url: str) -> int | None:
    """HTTP status of the dashboard's version page, asked without a token; None if nobody answers."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(f"{url}/api/version", timeout=ASK_S) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, ValueError):
        return None


def _token(mode: str) -> Verdict | None:
    """A token that others can read, or that is not there, protects nothing."""
    path = _token_path()
    if mode and mode.lower() not in MODES:
        return "fail", f"{MODE}={mode} is none of {', '.join(MODES)}: Ray uses no tokens then"
    if mode.lower() == "disabled":
        return None
    if os.environ.get(TOKEN):
        return "note", f"the token is in the environment ({TOKEN}), which child processes inherit; prefer {TOKEN_PATH}"
    if not os.path.isfile(path) or not os.path.getsize(path):
        wanted = mode or os.environ.get(TOKEN_PATH)
        return ("fail", f"{path}: no token there; ray get-auth-token --generate") if wanted else None
    # Whether the modes let somebody else reach and read it.
    for read, enter in ((stat.S_IROTH, stat.S_IXOTH), (stat.S_IRGRP, stat.S_IXGRP)):
        if path.stat().st_mode & read and all(folder.stat().st_mode & enter for folder in path.resolve().parents):
            return "fail", f"{path} can be read by other users: chmod 600 {path}"
    return "ok", f"{path}: other users cannot read it"
