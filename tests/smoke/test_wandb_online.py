"""W&B online, against a small server: nothing it does hurts a run, and what it has in the end is what Parquet has."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from tiny import TINY, run_tiny, tiny
from wandb_server import ENTITY, Fault, ReceivedRun, WandbServer

from fedtailor.core.errors import TrackingError
from fedtailor.core.settings import WandbConfig
from fedtailor.report.wandb import final_results, identity, series, sync_run, sync_wandb
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

KEY = "0123456789abcdef" * 2 + "01234567"
WORDS = ("methods=[fedp2eft]", "budgets=[2]", "task.languages=[eng]", "personalise.pools=[seen]",
         "base.rounds=2", "strategy.rounds=2", "base.cohort=3", "strategy.cohort=3",
         "save_adapters=true", "wandb.mode=online", "wandb.timeout_s=3", "seeds=[42,52]")  # fmt: skip
SLOW_S = 60
"""Far above what two waits of three seconds take, far below wandb's own patience."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[WandbServer]:
    with WandbServer() as here:
        monkeypatch.setenv("WANDB_BASE_URL", here.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        wandb.teardown()  # it remembers the server of the test before
        yield here
    wandb.teardown()


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Storage of a run that was killed in the rounds of its first seed's strategy."""
    storage = tmp_path_factory.mktemp("killed")
    words = [*TINY, *WORDS, f"storage={storage}", "wandb.mode=disabled", "--run-id", "run"]
    env = dict(os.environ) | {"FEDTAILOR_FAULT": "commit:after-record@4", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", "fedtailor", "run", *words], env=env, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return storage


@pytest.fixture(scope="module")
def complete(killed: Path, synced_early: dict[str, Any]) -> RunFolder:
    """The same run, resumed and complete."""
    assert synced_early
    return run_tiny(tiny(killed, *WORDS, "wandb.mode=disabled"))


@pytest.fixture(scope="module")
def synced_early(killed: Path) -> Iterator[dict[str, Any]]:
    """A server that has what there was when the run had been killed."""
    run = RunFolder.open(Storage(killed), "run")
    with pytest.MonkeyPatch.context() as patch, WandbServer() as here:
        wandb.teardown()
        patch.setenv("WANDB_API_KEY", KEY)
        patch.setenv("WANDB_BASE_URL", here.url)
        told = sync(run)
        yield {"server": here, "told": told, "points": list(series(run.metrics()))}


def sync(run: RunFolder, **config: Any) -> str:
    return sync_run(run, WandbConfig(**{"mode": "online", "timeout_s": 20.0} | config))


def cells(points: list[dict[str, Any]]) -> Counter[tuple[int, str, float]]:
    """(step, key, value) with how often each is there."""
    found = [(p.get("_step", at), k, v) for at, p in enumerate(points, 1) for k, v in p.items() if k != "_step"]
    return Counter(found)


def holds(received: ReceivedRun, run: RunFolder) -> None:
    """The server's history is the local one: every (step, key) once, every float equal to the last bit."""
    local = list(series(run.metrics()))
    assert cells(received.history()) == cells(local)
    assert set(cells(received.history()).values()) == {1}


def test_killed_synced_resumed_cut_off_and_synced_twice_gives_every_point_once(
    synced_early: dict[str, Any], complete: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    server: WandbServer = synced_early["server"]
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (received,) = server.runs.values()
    early = len(received.lines)
    assert early == len(synced_early["points"]) > 2
    # Everything but the last request of the file stream arrives; then the server is gone.
    before = server.asked.count("file_stream")
    server.fault = lambda kind, n: 404 if kind == "file_stream" and n > before else None
    with pytest.raises(TrackingError, match="did not take everything: filestream: fatal error"):
        sync(complete)
    server.fault = lambda *_: None
    told = sync(complete)
    sync(complete)
    assert told == synced_early["told"] == f"{server.url}/{ENTITY}/fedtailor/runs/{identity(complete)}"
    assert len(received.lines) > early
    assert received.sent == len(received.lines), "a line was sent twice"
    holds(received, complete)
    summary, _ = final_results(complete.metrics())
    assert {key: value for key, value in received.summary.items() if key.startswith("final/")} == summary
    assert received.summary["results"]["_type"] == "table-file"
    assert list(server.runs) == [identity(complete)]
    assert server.unknown == [""] * len(server.unknown), "wandb asks for more than the server knows"


def test_requested_artifacts_and_figures_arrive(complete: RunFolder, server: WandbServer) -> None:
    sync(complete, artifacts=("figures", "adapters", "report"), group="g", tags=("a",), job_type="trial")
    (received,) = server.runs.values()
    assert {key: received.record[key] for key in ("groupName", "tags", "jobType")} == {
        "groupName": "g", "tags": ["a"], "jobType": "trial",
    }  # fmt: skip
    kinds: dict[str, list[str]] = {}
    for artifact in server.artifacts.values():
        assert artifact["committed"]
        kinds.setdefault(artifact["artifactTypeName"], []).extend(artifact["files"])
    assert "report.html" in kinds["report"]
    adapters = [name for name in kinds["adapters"] if name.endswith("adapter_model.safetensors")]
    assert len(adapters) == len(set(complete.metrics("personalise")["client"])) * len(
        complete.info()["config"]["seeds"]
    )
    figures = {name.rsplit("/", 1)[1] for name in received.files if name.startswith("media/images/figures/")}
    assert figures
    history = received.history()
    assert [key for point in history[:-1] for key in point if key.startswith("figures/")] == []
    assert any(key.startswith("figures/") for key in history[-1])


FAULTS: dict[str, tuple[dict[str, Fault], str]] = {
    "down": ({"RunResumeStatus": 500}, "did not answer within wandb.timeout_s = 3 s.*HTTP 500"),
    "too many requests": ({"RunResumeStatus": 429}, "did not answer within wandb.timeout_s = 3 s.*HTTP 429"),
    "bad key": ({"RunResumeStatus": 401}, "refuses the key"),
    "hangs": ({"RunResumeStatus": "hang"}, "did not answer within wandb.timeout_s = 3 s"),
    "dies before the history": ({"file_stream": "drop"}, "did not answer within wandb.timeout_s = 3 s"),
    "refuses the history": ({"file_stream": 403}, "did not take everything: filestream: fatal error"),
    "refuses files": ({"upload": 404}, "did not take everything"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_server_costs_a_bounded_time_an_event_and_nothing_else(
    fault: str, complete: RunFolder, server: WandbServer
) -> None:
    kinds, told = FAULTS[fault]
    server.fault = lambda kind, _: kinds.get(kind)
    files = {p: p.read_bytes() for p in sorted(Path(complete.storage.url, "artifacts").rglob("*")) if p.is_file()}
    start = time.monotonic()
    problem = sync_wandb(complete, tiny(Path(complete.storage.url), *WORDS))
    assert time.monotonic() - start < SLOW_S
    assert problem is not None
    assert re.search(told, problem), problem
    assert KEY not in problem
    last = [event for event in complete.events.entries() if event["kind"] == "wandb"][-1]
    assert (last["state"], last["text"]) == ("failed", problem)
    assert {p: p.read_bytes() for p in files} == files
    assert not list(Path(complete.storage.url).glob("run/.wandb-*"))
    server.fault = lambda *_: None
    sync(complete)
    (received,) = server.runs.values()
    holds(received, complete)


def test_a_run_is_complete_and_tells_what_to_do_where_no_server_listens(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    env = dict(os.environ) | {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "OMP_NUM_THREADS": "1"}
    words = [*TINY, *WORDS, "methods=[base]", "base.rounds=1", "seeds=[42]", "save_adapters=false",
             f"storage={tmp_path}", "--run-id", "run", "--json-log"]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "fedtailor", "run", *words], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "W&B did not answer within wandb.timeout_s = 3 s" in done.stderr
    assert f"repeat with: fedtailor sync run --storage {tmp_path}" in done.stderr
    run = RunFolder.open(Storage(tmp_path), "run")
    assert run.status()["state"] == "complete"
    assert [event["state"] for event in run.events.entries() if event["kind"] == "wandb"] == ["failed"]
    assert KEY not in done.stdout + done.stderr
