"""What `doctor` asks about Ray: whoever reaches its ports runs code, so they need loopback or a token."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import psutil  # type: ignore[import-untyped,unused-ignore]

Level = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``fail`` makes `doctor` exit with 1."""

    what: str
    level: Level
    text: str


PORTS = {8265: "dashboard and jobs", 10001: "client", 6379: "head"}

DASHBOARD = 8265

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

MODES = ("token", "disabled")

ASK_S = 3.0

_ADVICE = f"Start Ray with --dashboard-host=127.0.0.1 and {MODE}=token"


def examine_ray(address: str | None) -> list[Finding]:
    """Looks at the ports of this machine, at the token, and at the cluster that would be joined.

    Args:
        address: as ``engine.address``, or a dashboard's ``http://host:port``; None or ``auto``: of this machine.
    """
    tokens = _tokens_are_used()
    findings = [_listening(port, tokens) for port in PORTS if _exposed(port)]
    if address not in (None, "", "auto", "local"):
        assert address
        findings += _joined(address, tokens)
    elif asked := _dashboard(f"http://127.0.0.1:{DASHBOARD}", "127.0.0.1"):
        findings.append(asked)
    findings += [*_mode(), *_token_file()]
    if not any(finding.what == "ray exposure" for finding in findings):
        text = "no Ray port listens beyond loopback; local runs bind to 127.0.0.1"
        findings.append(Finding("ray exposure", "ok", text))
    return findings


def _tokens_are_used() -> bool:
    """Whether a Ray that is started here asks for tokens: told so, or by itself where there is a token."""
    mode = os.environ.get(MODE)
    return mode.lower() == "token" if mode else bool(os.environ.get(TOKEN)) or _token_path().is_file()


def _token_path() -> Path:
    return Path(os.environ.get(TOKEN_PATH) or Path.home() / ".ray" / "auth_token")


def _listening(port: int, tokens: bool) -> Finding:
    name = f"{PORTS[port]} port {port}"
    public = _public_addresses()
    if port == DASHBOARD and not _wants_token(f"http://127.0.0.1:{port}", tokens):
        tokens = False
    if not tokens:
        text = f"{name} listens beyond loopback without tokens: whoever reaches it runs code here. {_ADVICE}"
        return Finding("ray exposure", "fail", text)
    if public:
        text = f"{name} listens at a public address ({', '.join(public)}), with unencrypted tokens. {_ADVICE}"
        return Finding("ray exposure", "fail", text)
    return Finding("ray exposure", "note", f"{name} listens beyond loopback, with unencrypted tokens")


def _exposed(port: int) -> bool:
    """Whether something accepts connections at ``port`` of an address that is not loopback."""
    for found in psutil.net_connections("tcp"):
        if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr.port == port:
            address = ipaddress.ip_address(found.laddr.ip)
            mapped = getattr(address, "ipv4_mapped", None) or address
            if not mapped.is_loopback:
                return True
    return False


def _public_addresses() -> list[str]:
    """This machine's own addresses that the whole internet can route to."""
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries]
    return [text for text in found if _is_public(text.partition("%")[0])]


def _is_public(text: str) -> bool:
    try:
        return ipaddress.ip_address(text).is_global
    except ValueError:
        return False  # a hardware address


def _joined(address: str, tokens: bool) -> list[Finding]:
    parts = urlsplit(address if "://" in address else f"ray://{address}")
    host = parts.hostname or ""
    try:
        found = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError as error:
        return [Finding("ray address", "fail", f"{address}: the host cannot be resolved ({error})")]
    if found.is_global:
        return [Finding("ray address", "fail", f"{address} is a public address ({found}); use a private network")]
    port = parts.port if parts.scheme.startswith("http") else DASHBOARD
    asked = _dashboard(
        f"{parts.scheme if parts.scheme == 'https' else 'http'}://{host}:{port or DASHBOARD}", str(found)
    )
    if not found.is_loopback and not tokens:
        text = f"{address} is joined without tokens; set {MODE}=token"
        return [Finding("ray address", "fail", text), *filter(None, [asked])]
    how = "token" if tokens else "loopback"
    return [Finding("ray address", "ok", f"{address} ({how})"), *filter(None, [asked])]


def _dashboard(url: str, ip: str) -> Finding | None:
    """Whether a dashboard answers somebody who shows no token; None if there is no dashboard."""
    status = _status(url)
    if status is None:
        return None
    make = partial(Finding, "ray dashboard")
    if status in (401, 403):
        return make("ok", f"{url} wants a token")
    if status != 200:
        return make("note", f"{url} answers with HTTP {status}: is this a Ray dashboard?")
    if ipaddress.ip_address(ip).is_loopback:
        return make("note", f"{url} answers without a token: all users of this machine can run code. Set {MODE}=token")
    return make("fail", f"{url} answers without a token: whoever reaches it runs code there. {_ADVICE}")


def _wants_token(url: str, otherwise: bool) -> bool:
    status = _status(url)
    return otherwise if status is None else status in (401, 403)


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


def _mode() -> list[Finding]:
    mode = os.environ.get(MODE)
    if not mode or mode.lower() in MODES:
        return []
    return [Finding("ray token", "fail", f"{MODE}={mode} is none of {', '.join(MODES)}: Ray uses no tokens then")]


def _token_file() -> list[Finding]:
    """A token that others can read, or that is not there, protects nothing."""
    if os.environ.get(MODE, "token").lower() != "token":
        return []
    if os.environ.get(TOKEN):
        text = f"the token is in the environment ({TOKEN}), which child processes inherit; prefer {TOKEN_PATH}"
        return [Finding("ray token", "note", text)]
    path = _token_path()
    try:
        filled = path.is_file() and path.stat().st_size > 0
    except OSError:
        filled = False
    if not filled:
        wanted = os.environ.get(TOKEN_PATH) or os.environ.get(MODE)
        return (
            [Finding("ray token", "fail", f"{path}: no token there; ray get-auth-token --generate")] if wanted else []
        )
    if _others_can_read(path):
        return [Finding("ray token", "fail", f"{path} can be read by other users: chmod 600 {path}")]
    return [Finding("ray token", "ok", f"{path}: other users cannot read it")]


def _others_can_read(path: Path) -> bool:
    """Whether the modes let somebody else reach and read a file."""
    for read, enter in ((stat.S_IROTH, stat.S_IXOTH), (stat.S_IRGRP, stat.S_IXGRP)):
        if path.stat().st_mode & read and all(folder.stat().st_mode & enter for folder in path.resolve().parents):
            return True
    return False
