"""The token that Ray's processes show each other: one for a local cluster, and words for one that is refused."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined,unused-ignore]
from ray.exceptions import AuthenticationError

from fedtailor.core.errors import PlacementError

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"


def provide_token() -> None:
    """Makes sure that there is a token before a local cluster is started, which wants one unless told otherwise.

    Ray would write ``~/.ray/auth_token`` itself, but readable by everybody, and two processes that do so at once
    would have different tokens. Where the home folder cannot be written, the environment gets one for this process.

    Raises:
        PlacementError: $RAY_AUTH_TOKEN_PATH names a file that cannot be read.
    """
    if os.environ.get(MODE, "token").lower() != "token":
        return
    loader = AuthenticationTokenLoader.instance()
    try:
        if loader.has_token(ignore_auth_mode=True):
            return
    except AuthenticationError as error:
        raise PlacementError(
            f"{_first(error)}; name a file that holds a token, or unset {TOKEN_PATH}, or set {MODE}=disabled"
        ) from error
    token = secrets.token_hex(32)
    try:
        _publish(Path.home() / ".ray" / "auth_token", token)
    except OSError:
        os.environ[TOKEN] = token
    loader.reset_cache()


def refusal(address: str) -> PlacementError:
    """Why a cluster that asks for a token does not let this process in, and what to do."""
    if os.environ.get(MODE, "").lower() != "token":
        return PlacementError(
            f"the Ray cluster at engine.address={address} wants a token, and this process shows none: "
            f"set {MODE}=token and {TOKEN_PATH}=FILE, a file that holds the cluster's token"
        )
    return PlacementError(
        f"the Ray cluster at engine.address={address} refuses the token that is found in {_source()}: "
        f"set {TOKEN_PATH}=FILE, a file that holds the cluster's token"
    )


def missing(address: str, error: AuthenticationError) -> PlacementError:
    """The error for a process that must show a token and has none."""
    return PlacementError(
        f"cannot join a Ray cluster at engine.address={address}: {_first(error)}; set {TOKEN_PATH}=FILE"
    )


def _source() -> str:
    """Where Ray takes the token from, in its order."""
    if os.environ.get(TOKEN):
        return f"${TOKEN}"
    path = os.environ.get(TOKEN_PATH)
    return f"{TOKEN_PATH}={path}" if path else str(Path.home() / ".ray" / "auth_token")


def _publish(path: Path, token: str) -> None:
    """Makes a file that only its owner reads, unless there is one: several processes then have the same token."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temp = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    try:
        with open(os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        os.link(temp, path)
    except FileExistsError:
        pass  # another process was faster
    finally:
        temp.unlink(missing_ok=True)


def _first(error: AuthenticationError) -> str:
    """Ray's message without its advice."""
    return str(error).partition(". ")[0].rstrip(".")
