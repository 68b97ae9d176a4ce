"""A Ray job whose node is lost: the job is submitted again, and the run goes on where it was.

The node that holds the driver has a PID namespace of its own: Ray connects a driver to a node that it finds among the
machine's processes, the head first, and would otherwise never drive from the second node of one machine.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import QUICK
from inspection import committed, full_digest, open_run
from test_jobs import BIN, SMALL, Head, running_head, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.chaos_long]
OWN_PIDS = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
if os.getuid():
    OWN_PIDS[1:1] = ["--user", "--map-current-user"]
DRIVERS = '{"drivers": 1}'


class Part:
    """A node that this test started, with all of its processes."""

    def __init__(self, words: list[str], env: dict[str, str], before: list[str] | None = None) -> None:
        command = [*(before or []), str(BIN / "ray"), "start", "--block", *words]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def family(self) -> list[psutil.Process]:
        with suppress(psutil.NoSuchProcess):
            mine = psutil.Process(self.process.pid)
            return [mine, *mine.children(recursive=True)]
        return []

    def names(self) -> str:
        told = []
        for member in self.family():
            with suppress(psutil.NoSuchProcess):
                told.append(" ".join(member.cmdline()))
        return "\n".join(told)

    def kill(self) -> None:
        """SIGKILL to the raylet and everything else of the node at once."""
        family = self.family()
        for member in family:
            with suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait(30)
        assert psutil.wait_procs(family, timeout=30)[1] == []


@pytest.fixture
def head() -> Iterator[Head]:
    """A head with tokens that notices lost nodes soon, and that takes no driver."""
    if shutil.which("unshare") is None or subprocess.run([*OWN_PIDS, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here: allow unprivileged user namespaces, or run as root")
    with running_head(1, "--system-config", json.dumps(QUICK)) as made:
        yield made


@pytest.fixture
def parts() -> Iterator[list[Part]]:
    made: list[Part] = []
    yield made
    for part in made:
        part.kill()


def add_node(head: Head, parts: list[Part]) -> Part:
    """A node that takes drivers, once the head has seen it."""
    before = len(nodes(head))
    words = ["--address", f"127.0.0.1:{head.gcs}", "--num-cpus", "1", "--resources", DRIVERS]
    words += ["--object-store-memory", "100000000", "--dashboard-agent-listen-port", "0"]
    # In one folder with the head, each node would delete the copies of the code that only the other needs.
    words += ["--temp-dir", str(head.folder / f"n{len(parts)}")]
    parts.append(Part(words, head.env, OWN_PIDS))
    wait_for(lambda: len(nodes(head)) > before or parts[-1].process.poll() is not None, parts[-1].names)
    assert parts[-1].process.poll() is None
    return parts[-1]


def nodes(head: Head) -> list[Any]:
    """Nodes that are alive."""
    found = head.ask("/api/v0/nodes?filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
    return list(found["data"]["result"]["result"])


def submit(head: Head, name: str, storage: Path, fault: str | None = None) -> None:
    planted = ["env", f"FEDTAILOR_FAULT={fault}"] if fault else []
    done = head.ray_job(
        "submit", "--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--submission-id", name,
        "--entrypoint-resources", DRIVERS, "--no-wait", "--", *planted, "python", "-m", "fedtailor", "run", *SMALL,
        f"storage={storage}", "--run-id", "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_driver_s_node_lost_the_job_is_submitted_again_and_goes_on(
    head: Head, parts: list[Part], tmp_path: Path
) -> None:
    """F7, as a user of a cluster meets it."""
    place, clean = tmp_path / "runs", tmp_path / "clean"
    words = [sys.executable, "-m", "fedtailor", "run", *SMALL, "engine.backend=serial", "--run-id", "run"]
    undisturbed = subprocess.run([*words, f"storage={clean}"], env=head.env, capture_output=True, text=True)
    assert undisturbed.returncode == 0, undisturbed.stdout + undisturbed.stderr

    node = add_node(head, parts)
    submit(head, "run-1", place, "slow stage=base round=2 seconds=60")
    head.waits("run-1", lambda: len(committed(place)) == 2)
    lost = node.names()
    assert "raylet" in lost
    assert "-m fedtailor run" in lost
    assert "ray::DriverActor" in lost
    before = committed(place)
    node.kill()
    wait_for(lambda: not head.is_live("run-1"))  # its log was on the node
    assert head.info("run-1")["status"] == "FAILED"
    assert head.info("run-1")["driver_exit_code"] is None
    assert committed(place) == before
    assert open_run(place).status()["state"] == "running", "nobody was left to say otherwise"

    add_node(head, parts)
    submit(head, "run-2", place)
    head.ends("run-2", "SUCCEEDED")
    after = committed(place)
    assert {name: after[name] for name in before} == before, "no round was played again"
    assert len(after) > len(before)
    assert full_digest(place) == full_digest(clean)
