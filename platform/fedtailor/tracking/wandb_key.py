"""Where the W&B key comes from: the environment, a file that it names, or ~/.netrc; never a configuration."""

from __future__ import annotations

import netrc
import os
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlparse

from fedtailor.core.errors import ConfigError
from fedtailor.core.settings import WandbConfig

Mode = Literal["offline", "online"]
KEY, KEY_FILE = "WANDB_API_KEY", "WANDB_API_KEY_FILE"


def find_key() -> str | None:
    """The key, or None where there is none.

    Raises:
        ConfigError: the file that is named cannot be read, or is empty.
    """
    if key := os.environ.get(KEY):
        return key
    if path := os.environ.get(KEY_FILE):
        try:
            key = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise ConfigError(f"{KEY_FILE}: {path} cannot be read: {reason}") from error
        if not key:
            raise ConfigError(f"{KEY_FILE}: {path} is empty")
        return key
    import wandb

    with suppress(OSError, netrc.NetrcParseError):
        known = netrc.netrc()
        # The server that this version of wandb (or WANDB_BASE_URL) talks to, and the one of older keys.
        for url in (wandb.Settings().base_url, "https://api.wandb.ai"):
            if entry := known.authenticators(urlparse(url).hostname or ""):
                return str(entry[2])
    return None


def api_key() -> str:
    """The key.

    Raises:
        ConfigError: there is none, or the file cannot be read; says where keys are looked for.
    """
    if key := find_key():
        return key
    raise ConfigError(
        f"'wandb.mode': online needs a key: set {KEY} or {KEY_FILE}, or run 'wandb login' (~/.netrc); "
        "or use wandb.mode=offline, or auto, which is offline without a key"
    )


def settled_mode(mode: str) -> Mode:
    """What a mode means here and now.

    Args:
        mode: ``auto`` is ``online`` if there is a key and WANDB_MODE does not say otherwise, else ``offline``.

    Raises:
        ConfigError: another mode than auto, offline and online, or a key file that cannot be read.
    """
    if mode == "auto":
        return "online" if os.environ.get("WANDB_MODE", "online") == "online" and find_key() else "offline"
    if mode not in ("online", "offline"):
        raise ConfigError(f"'wandb.mode': {mode} cannot be synced; use --mode auto, offline or online")
    return "online" if mode == "online" else "offline"


def check_wandb(config: WandbConfig, save_adapters: bool) -> None:
    """Finds before a run what W&B will miss at its end; asks no server.

    Args:
        config: the section ``wandb``.
        save_adapters: whether the run keeps its adapters.

    Raises:
        ConfigError: no key, no package, or adapters that the run will not keep.
    """
    if "adapters" in config.artifacts and not save_adapters:
        raise ConfigError("'wandb.artifacts': adapters are only there with save_adapters=true")
    if config.mode == "disabled":
        return
    if find_spec("wandb") is None:
        raise ConfigError(f"'wandb.mode': {config.mode} needs the package wandb: pip install wandb, or use disabled")
    if settled_mode(config.mode) == "online":
        api_key()
