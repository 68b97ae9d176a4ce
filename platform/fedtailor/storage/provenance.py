"""What a run was made with (versions, source revision, machine), and secrets kept out of all that is written.

Secrets are found by the name of a key, by the form of a value, and by the values of the environment's own secrets.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

import fedtailor

PACKAGES = (
    "torch", "transformers", "peft", "ray", "datasets", "numpy", "pyarrow", "safetensors", "pandas", "deepspeed",
)  # fmt: skip

HIDDEN = "***"
_ALWAYS = {"secret", "secrets", "password", "passwd", "passphrase", "credential", "credentials", "apikey"}
_IF_TEXT = {"key", "keys", "token", "tokens"}
_KNOWN = re.compile(r"\b(?:wandb_v\d_|hf_|gh[opsu]_)\w{20,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")
"""Keys that are recognised by their form: W&B, Hugging Face, GitHub, AWS (its ids; its secrets have no form)."""

_USER_INFO = re.compile(r"(?<=://)[^/@:\s]+(?::[^@\s]*)?(?=@)")
_ASSIGNED = re.compile(r"([\w.\-]+)=([^\s,;&'\"]+)")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def versions() -> dict[str, str]:
    """Python, fedtailor and the installed ones of PACKAGES."""
    installed = {"python": platform.python_version(), "fedtailor": fedtailor.__version__}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


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
    import torch  # a second, which commands that only read a folder do not need

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


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def redact(tree: Any, name: str = "", hidden: bool = False) -> Any:
    """A copy of a JSON-like tree without secrets.

    Hidden are texts under a key with the word key or token, any value under one with secret, password or
    the like, ``name=value`` words and ``{"key": name, "value": ...}`` entries for such names, user names
    and passwords in URLs, keys of a known form, and the values that such environment variables have now,
    wherever they occur.

    Args:
        tree: mappings, lists and scalars.
        name: key that it lies under.
        hidden: whether a key further up names a secret, so that all texts below it are.

    >>> redact({"wandb": {"api_key": "abc"}, "engine": {"token_budget": 64}, "overrides": ["a.token=x"]})
    {'wandb': {'api_key': '***'}, 'engine': {'token_budget': 64}, 'overrides': ['a.token=***']}
    """
    if isinstance(tree, Mapping | list | tuple):
        hidden = hidden or _hides(name, "")
        if not isinstance(tree, Mapping):
            return [redact(item, "", hidden) for item in tree]
        named = "" if hidden or set(tree) != {"key", "default", "value"} else str(tree["key"])
        return {k: v if named and k == "key" else redact(v, named or str(k), hidden) for k, v in tree.items()}
    if _hides(name, tree) or (hidden and isinstance(tree, str)):
        return HIDDEN
    return scrub(tree) if isinstance(tree, str) else tree


def scrub(text: str) -> str:
    """A text without the secrets of the environment, keys of known form, ``key=secret`` and passwords in URLs."""
    for value in _environment_secrets():
        text = text.replace(value, HIDDEN)
    return _KNOWN.sub(HIDDEN, _USER_INFO.sub(HIDDEN, _ASSIGNED.sub(_hide_assigned, text)))


def _hide_assigned(match: re.Match[str]) -> str:
    name, value = match.groups()
    return f"{name}={HIDDEN}" if _hides(name, value) and not value.isdecimal() else match.group()


def _hides(name: str, value: Any) -> bool:
    if value is None or isinstance(value, bool):
        return False
    words = {word.lower() for word in _WORDS.findall(name.rpartition(".")[2])}
    return bool(words & _ALWAYS) or (isinstance(value, str) and bool(words & _IF_TEXT))


def _environment_secrets() -> list[str]:
    # Short values are no secrets, and hiding them would garble every text.
    secrets = {value for name, value in os.environ.items() if len(value) >= 8 and _hides(name, value)}
    return sorted(secrets, key=len, reverse=True)
