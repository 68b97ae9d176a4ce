"""A whole run on a store that is no folder: the same digest, whatever dies, and everything can be taken out."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bucket_store
import pytest
from tiny import FORKED, TINY, run_tiny, tiny

from fedtailor import report as reporting
from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.experiment.prepare import prepare
from fedtailor.personalise import export
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder, committed_stages
from fedtailor.worker.worker import SerialPool

SHORT = ("methods=[fedp2eft]", "base.rounds=2", "strategy.rounds=1", "budgets=[2]", "task.clients_per_language=2",
         "base.cohort=4", "strategy.cohort=4", "personalise.chunk=6", "save_adapters=true")  # fmt: skip


def digest_of(run: RunFolder) -> str:
    return digest(run.storage, run.run_id)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny(tmp_path_factory.mktemp("local"), *SHORT))


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunFolder]:
    """A finished run on a store, and the node's cache that it left."""
    folder = tmp_path_factory.mktemp("remote")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDTAILOR_CACHE", str(folder / "cache"))
        patch.setenv("BUCKET_LOG", str(folder / "log"))
        yield run_tiny(on_store(folder))


def on_store(folder: Path, *more: str) -> Any:
    return tiny(folder, *SHORT, f"storage=bucket://{folder}/bucket", *more)


def root(run: RunFolder) -> Path:
    return Path(run.storage.url.removeprefix("bucket://"))


def test_a_run_on_a_store_has_the_digest_of_a_local_one(local: RunFolder, remote: RunFolder) -> None:
    assert digest_of(remote) == digest_of(local)
    assert all(stage["done"] for stage in committed_stages(remote))


def test_the_artifacts_have_the_same_names_and_bytes(local: RunFolder, remote: RunFolder) -> None:
    there, here = root(remote) / "artifacts", local.storage.local_path("artifacts")
    for pattern in ("data-*/*", "tokens-*/*", "model-*/*", "base-*/model/*"):
        files = {str(p.relative_to(there)): p.read_bytes() for p in there.glob(pattern) if p.name != "FILES.json"}
        assert files
        assert files == {str(p.relative_to(here)): p.read_bytes() for p in here.glob(pattern)}


def test_features_and_half_made_things_stay_on_the_node(remote: RunFolder) -> None:
    names = remote.storage.list("artifacts")
    assert {name.split("-")[0] for name in names} == {"data", "model", "tokens", "base", "strategy", "personalise"}
    assert not [path for path in root(remote).rglob("*") if path.name.startswith((".", "LOCK"))]


def test_a_node_that_made_the_inputs_downloads_none_of_them(remote: RunFolder) -> None:
    log = bucket_store.reads(root(remote).parent / "log")
    assert "FILES.json" in log
    assert not {"model.safetensors", "texts.arrow", "tokenizer.json"} & set(log)


def test_another_node_fetches_what_it_needs_and_reuses_every_stage(
    remote: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BUCKET_LOG", str(tmp_path / "log"))

    def forbidden(_on_event: Any) -> SerialPool:
        raise AssertionError("a pool was made")

    exp = tiny(tmp_path, *SHORT, f"storage={remote.storage.url}")
    assert digest_of(run_tiny(exp, "second", pool=forbidden)) == digest_of(remote)
    log = bucket_store.reads(tmp_path / "log")
    assert log.count("model.safetensors") == 1


def test_the_report_goes_to_the_store_or_to_a_folder_of_choice(
    remote: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def draw(*arguments: Any) -> None:
        out = arguments[4]
        (out / "figures").mkdir(parents=True)
        (out / "figures/a.svg").write_text("figure")
        (out / "report.html").write_text("page")

    monkeypatch.setattr(reporting, "write_report", draw)
    remote.storage.write_bytes("run/report/old.svg", b"of the report before")
    assert reporting.report_of(remote) == f"{remote.storage.url}/run/report/report.html"
    assert remote.storage.list("run/report") == ["figures", "report.html"]
    assert reporting.report_of(remote, tmp_path / "mine") == tmp_path / "mine/report.html"
    with pytest.raises(StorageError, match="not an empty folder"):
        reporting.report_of(remote, tmp_path / "mine")


def test_models_and_adapters_can_be_taken_out(remote: RunFolder, tmp_path: Path) -> None:
    export.export_base(remote, 42, tmp_path / "base")
    [model] = (root(remote) / "artifacts").glob("base-*/model/model.safetensors")
    assert (tmp_path / "base/model.safetensors").read_bytes() == model.read_bytes()
    assert not (tmp_path / "base/FILES.json").exists()
    belongs = export.export_client(remote, "seen/amh/00", "fedp2eft", 2, 42, tmp_path / "adapter")
    assert (belongs / "config.json").is_file()
    assert (tmp_path / "adapter/adapter_config.json").is_file()


def run_on_store(folder: Path, fault: str | None) -> None:
    """For a process of its own."""
    import torch

    torch.set_num_threads(1)
    os.environ["FEDTAILOR_CACHE"] = str(folder / "cache")
    if fault:
        os.environ["FEDTAILOR_FAULT"] = fault
    run_tiny(on_store(folder))


@pytest.mark.parametrize("fault", ["commit:record-temp@2", "commit:after-record@3"])
def test_killed_and_resumed_on_a_store_is_undisturbed(local: RunFolder, tmp_path: Path, fault: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED)
    codes = []
    for armed in (fault, None):
        process = context.Process(target=run_on_store, args=(tmp_path, armed))
        process.start()
        process.join(120)
        codes.append(process.exitcode)
    assert codes == [-signal.SIGKILL, 0]
    assert digest(Storage(f"bucket://{tmp_path}/bucket"), "run") == digest_of(local)


def test_a_store_in_memory_serves_one_process_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path))
    exp = tiny(tmp_path, "storage=memory://one-process", "engine.backend=ray")
    with pytest.raises(ConfigError, match=r"memory://one-process: its files live in one process"):
        prepare(exp, "run", lambda event: None)
    assert not Storage(exp.storage).exists("run")


@pytest.fixture
def s3(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A server that speaks S3, with an empty bucket; the environment in which clients find it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
    try:
        create = urllib.request.Request(f"{url}/bucket", method="PUT", headers={"Authorization": "AWS test:test"})
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(create).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield {**keys, "AWS_ENDPOINT_URL": url, "FEDTAILOR_CACHE": str(tmp_path / "cache")}
    finally:
        server.kill()
        server.wait()


def command(folder: Path, environment: dict[str, str], *words: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-m", "fedtailor", *words],
        env=dict(os.environ) | environment, text=True, capture_output=True, cwd=folder, timeout=280, check=False,
    )  # fmt: skip
    return process.returncode, process.stdout + process.stderr


def test_on_s3_a_run_is_killed_resumed_and_reported(local: RunFolder, tmp_path: Path, s3: dict[str, str]) -> None:
    run = ["run", *TINY, *SHORT, "storage=s3://bucket/runs", "--run-id", "run"]
    code, out = command(tmp_path, {**s3, "FEDTAILOR_FAULT": "commit:after-record@3"}, *run)
    assert code == -signal.SIGKILL, out
    storage = ["--storage", "s3://bucket/runs"]
    code, out = command(tmp_path, s3, "resume", "run", *storage)
    assert code == 0, out
    assert "s3://bucket/runs/run/report/report.html" in out
    code, out = command(tmp_path, s3, "digest", "run", *storage)
    assert out.strip() == digest_of(local)
