"""Joining a Ray cluster that others started, and the token that its processes show each other.

A cluster is joined in seconds, or refused in seconds with the reason. A local cluster gets a token of its own.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import grpc  # type: ignore[import-untyped,unused-ignore]
import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined,unused-ignore]
from ray.exceptions import AuthenticationError

from fedtailor.core.errors import PlacementError
from fedtailor.core.outside import packages

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

KNOCK_S = 5.0

PACKAGES = ("fedtailor", "actors", "tune_spaces")

CLIENT = "ray://"

_HEAD_CALL, _CLIENT_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive", "/ray.rpc.RayletDriver/KVExists"

_PORTS = "host:port is the head's port (6379), ray://host:port the client server's (10001)"


def provide_token() -> None:
    """Makes sure that there is a token before a local cluster is started, which wants one by default.

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


def join(address: str) -> None:
    """Connects this process to a cluster; fedtailor's code, and methods from outside, go along unless a Ray job has
    brought them.

    Args:
        address: ``auto``, ``host:port`` or ``ray://host:port``.

    Raises:
        PlacementError: nobody listens there, it is no Ray port, or the token is missing or wrong.
    """
    if address.startswith(("http://", "https://")):
        raise PlacementError(
            f"engine.address={address} is a dashboard, which takes jobs: ray job submit --address {address} "
            f"-- python -m fedtailor run ... To join a cluster from here: {_PORTS}"
        )
    try:
        _knock(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **_code())
    except AuthenticationError as error:
        raise missing(address, error) from error
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise PlacementError(f"cannot join a Ray cluster at engine.address={address}: {error} ({_PORTS})") from error


def _knock(address: str) -> None:
    """Fails at once where nobody listens or the token is refused; Ray itself would try for half a minute or more."""
    if address == "auto":
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does for this address
    place = canonicalize_bootstrap_address("auto") if address == "auto" else address.removeprefix(CLIENT)
    host, _, port = (place or "").rpartition(":")
    if not host or not port.isdigit():
        return  # names that only Ray can resolve, or no cluster, as it will say
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S).close()
    except OSError as error:
        raise PlacementError(f"no Ray cluster listens at engine.address={address}: {error}") from error
    _show_token(address, f"{host}:{port}", _CLIENT_CALL if address.startswith(CLIENT) else _HEAD_CALL)


def _show_token(address: str, place: str, call: str) -> None:
    """Sends an empty request: what comes back tells whether Ray is there and lets this process in."""
    channel = init_grpc_channel(place)
    try:
        channel.unary_unary(call)(b"", timeout=KNOCK_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            raise refusal(address) from None
        if error.code() == grpc.StatusCode.UNAVAILABLE:
            raise PlacementError(
                f"what listens at engine.address={address} does not speak as Ray does here ({_PORTS}; RAY_USE_TLS must "
                "be as on the cluster)"
            ) from None
        # Any other answer to an empty request is Ray's; a busy head may also answer late.
    finally:
        channel.close()


def _code() -> dict[str, Any]:
    """The code as modules that Ray takes to every node; a job's working directory has done that already."""
    if RAY_JOB_CONFIG_JSON_ENV_VAR in os.environ:
        return {}
    specs = [find_spec(name) for name in PACKAGES]
    folders = [str(Path(place).resolve()) for spec in specs if spec for place in spec.submodule_search_locations or ()]
    return {"runtime_env": {"py_modules": [*folders, *map(str, packages())]}}
