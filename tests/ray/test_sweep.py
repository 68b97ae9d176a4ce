"""Ray Tune for real: a trial is a run in its own placement group, and a killed sweep is taken up where it was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from tiny import TINY
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

pytestmark = [pytest.mark.ray, pytest.mark.slow]

LAMBDA = "fedp2eft/lambda_lr"
WORDS = [word for word in TINY if not word.startswith(("methods=", "budgets="))]
SMALL = ["budgets=[2]", "strategy.rounds=15"]


def command(storage: Path) -> list[str]:
    return ["sweep", LAMBDA, *WORDS, *SMALL, f"storage={storage}", "--sweep-id", "s"]


def start(storage: Path, output: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "fedtailor", *command(storage)]
    env = dict(os.environ) | {"OMP_NUM_THREADS": "1"}
    env.pop("RAY_ADDRESS", None)
    with (storage / output).open("wb") as file:
        _started.append(subprocess.Popen(words, env=env, cwd=storage, stdout=file, stderr=subprocess.STDOUT))
    return _started[-1]


_started: list[subprocess.Popen[bytes]] = []


@pytest.fixture(autouse=True)
def _none_is_left() -> Iterator[None]:
    yield
    while _started:
        _started.pop().kill()  # its cluster ends with it; no effect on one that has ended


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[bytes], seconds: float = 420) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode}"
        assert time.monotonic() < deadline, "the sweep does not get there"
        time.sleep(0.02)


def finish(storage: Path, output: str, expected: int, process: subprocess.Popen[bytes] | None = None) -> str:
    code = (process or start(storage, output)).wait(timeout=400)
    told = (storage / output).read_text()
    assert code == expected, told
    return told


def state(storage: Path, number: int) -> str:
    path = storage / f"s-0{number}" / "status.json"
    return str(json.loads(path.read_text())["state"]) if path.exists() else "none"


def started(storage: Path, number: int) -> list[str]:
    """Stages that the run of a trial has begun, each time it began them."""
    events = RunFolder.open(Storage(str(storage)), f"s-0{number}").events.entries()
    return [e["stage"] for e in events if e["kind"] == "stage" and e["state"] == "running"]


def test_a_sweep_killed_twice_is_restored_without_running_anything_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start(tmp_path, "first")
    wait_for(lambda: {"complete", "running"} <= {state(tmp_path, n) for n in range(4)}, first)
    first.kill()  # with its cluster, in the middle of other trials
    first.wait()
    before = {n: started(tmp_path, n) for n in range(4) if state(tmp_path, n) == "complete"}
    assert 1 <= len(before) < 4

    second = start(tmp_path, "second")
    wait_for(lambda: ")  started" in (tmp_path / "second").read_text(), second)
    second.send_signal(signal.SIGTERM)
    told = finish(tmp_path, "second", 143, second)
    assert "The same words take the sweep up again" in told
    assert "running" not in [state(tmp_path, n) for n in range(4)]

    out = finish(tmp_path, "third", 0)
    record = json.loads((tmp_path / "s/sweep.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["complete"] * 4
    assert [trial["values"] for trial in record["trials"]] == [
        {"fedp2eft.stage1.lambda_lr": value} for value in (0.1, 0.01, 0.001, 0.0001)
    ]
    assert record["best"]["value"] == max(trial["value"] for trial in record["trials"])
    assert "the paper's choice" in out
    for number, stages in before.items():
        assert started(tmp_path, number) == stages, "a finished trial was run again"
    assert len(list(tmp_path.glob("artifacts/base-*"))) == 1
    for number in range(4):
        assert "base/seed42" not in started(tmp_path, number), "a trial trained the base that it should share"
    for commits in tmp_path.glob("artifacts/strategy-*/rounds"):
        assert len(list(commits.glob("*/COMMIT.json"))) == 15
    assert not list(tmp_path.glob("artifacts/strategy-*/quarantine/*"))

    again = CliRunner().invoke(app, command(tmp_path))  # nothing is left: no cluster, the same table
    assert again.exit_code == 0, again.output
    assert "started" not in again.output
    assert "the paper's choice" in again.output
    assert not ray.is_initialized()
    monkeypatch.chdir(tmp_path)
    best = CliRunner().invoke(app, ["plan", *WORDS, "budgets=[2]", str(tmp_path / "s/best.yaml")])
    assert best.exit_code == 0, best.output


@pytest.mark.parametrize(("workers", "trials"), [(1, 2), (2, 1)])
def test_client_actors_take_the_bundles_of_their_own_trial_and_the_driver_takes_none(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, trials: int
) -> None:
    from ray import tune
    from tune_trial import place

    from actors.placement import ActorPlan
    from tune_spaces.search import bundles

    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    group = tune.PlacementGroupFactory(bundles(ActorPlan(workers, 1.0, 0.0, None, 2), serial=False))
    space = {"number": tune.grid_search(list(range(trials))), "folder": str(tmp_path), "meet": trials > 1}
    tuner = tune.Tuner(
        tune.with_resources(place, group), param_space=space,
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path / "own"), verbose=0),
    )  # fmt: skip
    found = [result.metrics for result in tuner.fit()]
    assert len({metrics["group"] for metrics in found}) == trials
    for metrics in found:
        assert metrics["mine"] == {}
        assert metrics["actors"] == [(metrics["group"], 1.0)] * workers
        assert metrics["together"] == trials
        assert metrics["groups"] <= trials, "something inside a trial made a group of its own"
