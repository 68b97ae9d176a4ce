"""Joining a Ray cluster that others started: in seconds, or refused in seconds and in plain words."""

from __future__ import annotations

import logging
import os
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
from ray.exceptions import AuthenticationError

from actors.auth_token import missing, refusal
from fedtailor.core.errors import PlacementError

KNOCK_S = 5.0
PACKAGES = ("fedtailor", "actors", "tune_spaces")
CLIENT = "ray://"
_HEAD_CALL, _CLIENT_CALL = "/ray.rpc.NodeInfoGcsService/CheckAlive", "/ray.rpc.RayletDriver/KVExists"
_PORTS = "host:port is the head's port (6379), ray://host:port the client server's (10001)"


def join(address: str) -> None:
    """Connects this process to a cluster; fedtailor's code goes along unless a Ray job has brought it.

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
    found = [find_spec(name) for name in PACKAGES]
    folders = [str(Path(place).resolve()) for spec in found if spec for place in spec.submodule_search_locations or ()]
    return {"runtime_env": {"py_modules": folders}}
