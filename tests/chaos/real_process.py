"""Runs as real processes with real exit codes, forked from a server that has imported everything once.

The command line runs as it is, but for two things that would only cost time here: the round loop lives in the forked
process instead of a Ray actor of its own (`actors.driver_actor`, which other tests kill), and no report is drawn.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tiny import FORKED

TRACE, OUTPUT = "trace.jsonl", "output.txt"


class Process:
    """One command.

    Args:
        folder: where it runs; gets `TRACE` (every event with its time) and `OUTPUT`.
        words: the command line without ``fedtailor``.
        fault: a fault plan, or None.
        driver_node: id of the node where the round loop is to live in an actor, as it does for users; else here.
    """

    def __init__(self, folder: Path, words: Sequence[str], fault: str | None = None, driver_node: str = "") -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(FORKED)
        environment = {"FEDTAILOR_FAULT": fault} if fault else {}
        # A daemon, so that Ctrl-C on the tests leaves nothing behind.
        self._process = context.Process(
            target=command, args=(folder, list(words), environment, driver_node), daemon=True
        )
        self._folder = folder
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def running(self) -> bool:
        return self._process.is_alive()

    def wait(self, seconds: float) -> int:
        """Exit code; negative for a signal.

        Raises:
            TimeoutError: it still runs; it is killed.
        """
        self._process.join(seconds)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"no end after {seconds:g} s: {self.output()[-2000:]}")
        return self._process.exitcode

    def output(self) -> str:
        return (self._folder / OUTPUT).read_text()


def command(folder: Path, words: Sequence[str], environment: Mapping[str, str], driver_node: str) -> None:
    """What the forked process does."""
    os.environ.pop("FEDTAILOR_FAULT", None)
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(folder / OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    import torch

    torch.set_num_threads(1)
    from fedtailor import cli
    from fedtailor import report as reporting

    if driver_node:
        _drive_on(driver_node)
    else:
        cli.BACKENDS["ray"] = "real_process:run_here"  # type: ignore[index]
    reporting.report_of = lambda *_: Path("not drawn")  # type: ignore[assignment]
    sys.argv = ["fedtailor", *words]
    cli.main()


def _drive_on(node: str) -> None:
    from ray._private import ray_constants
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from actors import driver_actor

    ray_constants.ENABLE_RAY_CLUSTER = False
    there = NodeAffinitySchedulingStrategy(node, soft=False)
    driver_actor.NodeAffinitySchedulingStrategy = lambda *_, **__: there  # type: ignore[assignment,misc]


def run_here(entry: str, payload: Mapping[str, Any], config: Any, on_event: Any, should_stop: Any) -> None:
    """The Ray backend with the round loop in this process."""
    from ray._private import ray_constants

    from actors.ray_pool import RayPool
    from actors.session import ensure_ray
    from fedtailor.core.config import resolve

    if (config.address or "").startswith("127."):
        # Ray would replace the address of a cluster on the loopback interface by the one that other machines see.
        ray_constants.ENABLE_RAY_CLUSTER = False
    ensure_ray(config.address, config.threads)
    file = open(TRACE, "a", buffering=1)  # noqa: SIM115 - lives as long as the process

    def traced(event: dict[str, Any]) -> None:
        file.write(json.dumps({"at": time.time(), "by": os.getpid(), **event}, default=str) + "\n")
        on_event(event)

    resolve(entry)(payload, RayPool, traced, should_stop)


def trace(folder: Path) -> list[dict[str, Any]]:
    """All events of all processes of a folder, in order of time."""
    path = folder / TRACE
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
