"""Clients may be called anything: their adapters are committed, found again after a stop, and taken out by name."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from tiny import open_run, run_tiny, talk

from fedtailor.core.errors import Interrupted, StorageError
from fedtailor.experiment.config import ExperimentBase
from fedtailor.personalise.export import export_client
from fedtailor.storage.payloads import encode
from fedtailor.storage.run_folder import RunFolder

NAMES = (
    ".", "..", "a/b", "a\\b", "a\nb", "a\0b", "Ana", "ana", "Jos\u00e9", "Jose\u0301", "x" * 300, "x" * 300 + "y",
)  # fmt: skip


@pytest.fixture(scope="module")
def exp(tmp_path_factory: pytest.TempPathFactory) -> ExperimentBase:
    folder = tmp_path_factory.mktemp("names")
    rows = [
        {"client": name, "instruction": f"say {i}", "response": f"{'abcdefghijkl'[number]} {i}"}
        for number, name in enumerate(NAMES)
        for i in range(3)
    ]
    (folder / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    own = ("task=instructions", f"task.path={folder}/d.jsonl", "task.max_length=64", "methods=[lora]", "budgets=[1]")
    return talk(folder / "runs", *own, "base=none", "save_adapters=true", "decoding.max_test=1")


@pytest.fixture(scope="module")
def run(exp: ExperimentBase) -> RunFolder:
    calls = iter(range(100))
    with pytest.raises(Interrupted):
        run_tiny(exp, should_stop=lambda: next(calls) > 2)
    assert len(open_run(exp).metrics()) > 0
    return run_tiny(exp)


def files_of(run: RunFolder) -> list[str]:
    commits = run.log(run.stages("personalise")[0]).all()
    return [name for commit in commits for name in commit.objects if name.endswith("adapter_model.safetensors")]


def test_each_client_has_a_folder_of_its_own_on_any_file_system(run: RunFolder) -> None:
    found = files_of(run)
    assert len(found) == len(NAMES)
    assert len({unicodedata.normalize("NFC", name).casefold() for name in found}) == len(NAMES)


def test_each_adapter_is_taken_out_by_its_clients_id(run: RunFolder, tmp_path: Path) -> None:
    clients = sorted(run.metrics()["client"].unique())
    assert len(clients) == len(NAMES)
    for number, client in enumerate(clients):
        export_client(run, client, "lora", 1, 42, tmp_path / str(number))
    weights = {(tmp_path / str(k) / "adapter_model.safetensors").read_bytes() for k in range(len(clients))}
    assert len(weights) == len(NAMES)


def test_a_client_that_is_not_there_is_named_beside_the_nearest(run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"no committed client 'seen/all/Anna'; did you mean 'seen/all/Ana'"):
        export_client(run, "seen/all/Anna", "lora", 1, 42, tmp_path / "out")


def test_adapters_that_earlier_versions_named_by_the_id_itself_are_found(run: RunFolder, tmp_path: Path) -> None:
    stage = run.stages("personalise")[0]
    log = run.log(stage)
    content = {"adapter_config.json": b"{}", "adapter_model.safetensors": encode("x.safetensors", {})[1]}
    objects = {f"adapters/r1/seen/all/Old/{name}": data for name, data in content.items()}
    log.commit(len(log.all()), objects, {"kind": "chunk", "cohort": ["seen/all/Old"], "rejected": []})
    export_client(run, "seen/all/Old", "lora", 1, 42, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
