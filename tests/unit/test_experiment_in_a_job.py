"""What differs where Ray starts the command: the folder it starts in, the address, and who else has the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import RAY_PKG_PREFIX
from ray._private.runtime_env.working_dir import WorkingDirPlugin
from tiny import open_run, run_tiny, tiny
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.core.errors import ConfigError, LockedError, PlacementError, StorageError
from fedtailor.experiment import launch
from fedtailor.experiment.prepare import check_placement, refuse_job_folder, refuse_other_configuration, run_folder
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import Lock
from fedtailor.storage.payloads import canonical_json, sha256


@pytest.fixture
def job_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a job, under the name that Ray gives it."""
    plugin = WorkingDirPlugin(str(tmp_path / "runtime_resources"), None)
    folder = Path(plugin._get_directory_on_node(f"gcs://{RAY_PKG_PREFIX}0123456789abcdef.zip"))
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("url", ["./runs", "runs", "", "file://{here}/runs", "{here}", "../_ray_pkg_fedcba/x"])
def test_results_in_a_job_s_working_directory_are_refused(job_folder: Path, url: str) -> None:
    with pytest.raises(
        ConfigError, match=r"'storage': .* lies in this Ray job's copy .* which Ray deletes; give a fol"
    ):
        refuse_job_folder("storage", url.format(here=job_folder))


def test_a_link_out_of_the_working_directory_is_where_it_leads_to(job_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (job_folder / "runs").symlink_to(tmp_path / "shared")
    (tmp_path / "back").symlink_to(job_folder)
    refuse_job_folder("storage", "runs")
    with pytest.raises(ConfigError):
        refuse_job_folder("storage", tmp_path / "back" / "other")


@pytest.mark.parametrize("url", ["{tmp}/shared", "memory://runs"])
def test_other_places_are_fine_in_a_job(job_folder: Path, tmp_path: Path, url: str) -> None:
    refuse_job_folder("storage", url.format(tmp=tmp_path))


def test_elsewhere_a_relative_storage_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuse_job_folder("storage", "./runs")


@pytest.mark.parametrize("words", [["run", "demo"], ["resume", "demo"]])
def test_run_and_resume_refuse_it_and_leave_nothing(job_folder: Path, words: list[str]) -> None:
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "which Ray deletes" in result.stderr) == (2, True), result.output
    assert list(job_folder.iterdir()) == []


def test_the_option_is_the_key(tmp_path: Path) -> None:
    exp = tiny(tmp_path, "engine.backend=ray")
    assert launch.at_address(exp, None) is exp
    joined = launch.at_address(exp, "auto")
    assert joined == tiny(tmp_path, "engine.backend=ray", "engine.address=auto")
    assert launch.at_address(joined, "auto") == joined
    assert launch.default_run_id([], joined) == launch.default_run_id([], exp)


def test_two_addresses_are_refused_unless_one_is_to_replace_the_other(tmp_path: Path) -> None:
    exp = tiny(tmp_path, "engine.backend=ray", "engine.address=ray://far:10001")
    with pytest.raises(ConfigError, match=r"--address=auto and 'engine.address'=ray://far:10001 differ: give one"):
        launch.at_address(exp, "auto")
    assert launch.at_address(exp, "local", instead=True).engine.address == "local"


def test_an_address_without_ray_is_refused(tmp_path: Path) -> None:
    words = ["run", f"storage={tmp_path}", "engine.backend=serial", "--address", "auto"]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, "'engine.backend' is serial" in result.stderr) == (2, True), result.output


def test_a_run_may_go_on_at_another_address(tmp_path: Path) -> None:
    open_run(tiny(tmp_path, "engine.backend=ray", "engine.address=auto"))
    refuse_other_configuration(Storage(tmp_path), "run", tiny(tmp_path, "engine.backend=ray"))


def test_a_run_from_before_a_key_goes_on_and_one_of_another_configuration_does_not(tmp_path: Path) -> None:
    exp = tiny(tmp_path)
    run = run_folder(exp, "run")
    info = run.info()
    del info["config"]["model"]["attention"]
    run.storage.write_json("run/run.json", {**info, "config_hash": sha256(canonical_json(info["config"]))})
    assert run_folder(exp, "run").info()["created"] == info["created"]
    with pytest.raises(StorageError, match=r"another configuration: seeds is \(42,\) there and \(7,\) here"):
        run_folder(tiny(tmp_path, "seeds=[7]"), "run")


def test_gpus_are_asked_of_the_cluster_that_a_job_joins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    exp = tiny(tmp_path, "engine.backend=ray", "engine.num_gpus=1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(PlacementError):
        check_placement(exp)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    check_placement(exp)
    with pytest.raises(PlacementError):
        check_placement(launch.at_address(exp, "local"))


def test_a_refused_second_start_leaves_the_first_one_s_status(tmp_path: Path) -> None:
    exp = tiny(tmp_path, "methods=[base]", "base.rounds=1")
    run = open_run(exp)
    run.set_status("running", "by the first", {"launcher": {"pid": 1, "machine": "another"}})
    before = run.status()

    def refused(*_: Any) -> None:
        assert run.status()["progress"]["launcher"]["pid"] == os.getpid()
        with Lock(run.storage, run.run_id, run.run_id):
            raise AssertionError("two runs at once")

    with Lock(run.storage, run.run_id, run.run_id), pytest.raises(LockedError, match="is held by run 'run'"):
        launch.launch(refused, run, exp, lambda _: None, lambda: False)
    after = run.status()
    assert {key: after[key] for key in ("state", "message", "progress")} == {
        key: before[key] for key in ("state", "message", "progress")
    }


def test_a_refused_second_start_does_not_undo_what_the_first_one_said_meanwhile(tmp_path: Path) -> None:
    exp = tiny(tmp_path, "methods=[base]", "base.rounds=1")
    run = run_tiny(exp)
    run.set_status("running", "")

    def refused(*_: Any) -> None:
        run.set_status("complete", "")
        raise LockedError("held")

    with pytest.raises(LockedError):
        launch.launch(refused, run, exp, lambda _: None, lambda: False)
    assert run.status()["state"] == "complete"
