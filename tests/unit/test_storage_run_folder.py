"""The run folder: made whole, bound to one configuration, free of secrets, and the way to the results."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fedtailor.core.errors import StorageError
from fedtailor.core.messages import METRIC_COLUMNS, metric_row
from fedtailor.storage.commit import DamagedError
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage
from fedtailor.storage.provenance import redact
from fedtailor.storage.round_store import TIMING_COLUMNS
from fedtailor.storage.run_folder import RunFolder, run_ids

CONFIG: dict[str, Any] = {
    "seeds": [42],
    "task": {"name": "cldr"},
    "engine": {"actors": 2, "token_budget": 64},
}
CANARY = "canary-7f3e9a"


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "local":
        yield Storage(tmp_path)
        return
    found = Storage(f"memory://{tmp_path.name}")
    yield found
    for name in found.list():
        found.delete(name)


def stage(kind: str, method: str, seed: int = 42) -> dict[str, Any]:
    key = f"{kind}/seed{seed}" if kind == "base" else f"{kind}/{method}/seed{seed}"
    return {"key": key, "kind": kind, "method": method, "seed": seed, "artifact": f"{kind}-{method}{seed}"}


def rows(kind: str, method: str, index: int, clients: tuple[str, ...] = ("a", "b")) -> pa.Table:
    made = [
        metric_row(stage=kind, method=method, seed=42, round=index, client=c, metric="acc", value=0.1 * n, weight=3.0)
        for n, c in enumerate(clients)
    ]
    return pa.Table.from_pylist(made)


def test_run_json_says_what_was_asked_and_what_it_ran_on(storage: Storage) -> None:
    overrides = [{"key": "engine.actors", "default": None, "value": 2}]
    run = RunFolder.create(storage, "first", CONFIG, overrides)
    info = RunFolder.open(storage, "first").info()
    assert (info["run_id"], info["config"], info["overrides"]) == ("first", CONFIG, overrides)
    assert {"python", "fedtailor", "torch", "transformers", "peft"} <= info["versions"].keys()
    assert info["hardware"]["cores"] >= 1
    assert info["hardware"]["memory"] > 2**28
    assert info["git"] is None or set(info["git"]) == {"sha", "dirty"}
    assert run.status()["state"] == "running"


@pytest.mark.parametrize("run_id", ["", ".hidden", "a/b", "..", "a b", "ä", "a" * 129, "artifacts", "x\n"])
def test_a_run_id_of_other_characters_is_refused(storage: Storage, run_id: str) -> None:
    with pytest.raises(StorageError, match="run id"):
        RunFolder.create(storage, run_id, CONFIG)
    assert storage.list() == []


def test_the_same_configuration_finds_its_run_again(storage: Storage) -> None:
    RunFolder.create(storage, "r", CONFIG).set_stages([stage("base", "fedavg")])
    assert RunFolder.create(storage, "r", json.loads(json.dumps(CONFIG))).stages() == [stage("base", "fedavg")]


def test_an_edited_configuration_is_noticed(storage: Storage) -> None:
    RunFolder.create(storage, "r", CONFIG)
    info = storage.read_json("r/run.json")
    info["config"]["seeds"] = [52]
    storage.write_json("r/run.json", info)
    with pytest.raises(StorageError, match="was edited"):
        RunFolder.create(storage, "r", {**CONFIG, "seeds": [52]})


def test_a_folder_that_is_no_run_is_left_alone(storage: Storage) -> None:
    storage.write_bytes("r/notes.txt", b"mine")
    with pytest.raises(StorageError, match="is no run"):
        RunFolder.create(storage, "r", CONFIG)
    assert storage.list("r") == ["notes.txt"]


def test_an_unknown_run_is_answered_with_those_that_exist(storage: Storage) -> None:
    RunFolder.create(storage, "here", CONFIG)
    storage.write_bytes("artifacts/base-1/x", b"")
    assert run_ids(storage) == ["here"]
    with pytest.raises(StorageError, match=r"no run 'there' .*runs there: here"):
        RunFolder.open(storage, "there")


def test_a_failure_while_it_is_made_leaves_nothing(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(storage, "create", fail)
    with pytest.raises(StorageError, match="disk full"):
        RunFolder.create(storage, "r", CONFIG)
    assert storage.list() == []


def test_no_secret_reaches_any_file(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-env")
    config = {
        "wandb": {"api_key": CANARY, "key": CANARY, "hfToken": CANARY, "project": f"x-{CANARY}-env"},
        "secrets": {"one": CANARY, "many": [CANARY]},
        "db": {"password": 12345, "url": f"s3://user:{CANARY}@host/bucket"},
        "engine": {"token_budget": 64, "max_tokens": 7},
        "tokenizer": "word",
    }
    overrides = [f"wandb.api_key={CANARY}", {"key": "hf.token", "default": None, "value": CANARY}]
    run = RunFolder.create(storage, "r", config, overrides)
    run.events.append({"kind": "warning", "text": f"401 for {CANARY}-env, api_key={CANARY}"})
    run.failures.append({"client": "a", "reason": f"bad header {CANARY}-env"})
    run.set_status("failed", f"W&B refused {CANARY}-env")
    for name in storage.list("r"):
        assert CANARY not in storage.read_bytes(f"r/{name}").decode(), name
    kept = run.info()["config"]
    assert (kept["engine"], kept["tokenizer"]) == ({"token_budget": 64, "max_tokens": 7}, "word")
    assert kept["db"] == {"password": "***", "url": "s3://***@host/bucket"}
    assert kept["wandb"]["api_key"] == "***"


def test_stage_keys_and_plain_text_are_not_taken_for_secrets() -> None:
    stages = [stage("base", "fedavg")]
    assert redact([{"key": "strategy.rounds", "default": 150, "value": 20}]) == [
        {"key": "strategy.rounds", "default": 150, "value": 20}
    ]
    assert redact("a=1, rounds=3 tokens=64") == "a=1, rounds=3 tokens=64"
    assert stages[0]["key"] == "base/seed42"


def test_events_and_failures_are_kept_in_order_and_a_torn_line_costs_only_itself(storage: Storage) -> None:
    run = RunFolder.create(storage, "r", CONFIG)
    run.events.append({"event": "one", "key": "base/seed42"})
    storage.append("r/events.jsonl", '{"event": "to')
    again = RunFolder.open(storage, "r")
    again.events.append({"event": "two"})
    again.events.append({"event": "three"})
    assert [e.get("event", e.get("unreadable")) for e in again.events.entries()] == [
        "one",
        '{"event": "to',
        "two",
        "three",
    ]
    assert again.events.entries()[0]["key"] == "base/seed42"
    assert again.failures.entries() == []
    again.failures.append({"client": "a", "reason": "NaN"})
    assert again.failures.entries()[0]["reason"] == "NaN"


def test_the_status_is_one_of_four(storage: Storage) -> None:
    run = RunFolder.create(storage, "r", CONFIG)
    run.set_status("interrupted", "Ctrl-C", {"base/seed42": 3})
    status = run.status()
    assert (status["state"], status["message"], status["progress"]) == (
        "interrupted",
        "Ctrl-C",
        {"base/seed42": 3},
    )
    with pytest.raises(StorageError, match="running, complete, failed, interrupted"):
        run.set_status("done")  # type: ignore[arg-type]


def test_timings_are_kept_per_client(storage: Storage) -> None:
    run = RunFolder.create(storage, "r", CONFIG)
    assert tuple(run.timings().columns) == TIMING_COLUMNS
    run.timing("base/seed42", 0, {"a": 0.5, "b": 1.5})
    run.timing("base/seed42", 1, {"a": 0.25})
    run.timing("base/seed42", 2, {})
    assert run.timings()["seconds"].tolist() == [0.5, 1.5, 0.25]


def test_metrics_are_the_rows_of_all_committed_rounds(storage: Storage) -> None:
    run = RunFolder.create(storage, "r", CONFIG)
    assert list(run.metrics().columns) == list(METRIC_COLUMNS)
    assert len(run.metrics()) == 0
    stages = [stage("base", "fedavg"), stage("personalise", "lora")]
    run.set_stages(stages)
    for index in range(2):
        run.log(stages[0]).commit(index, {"metrics": rows("base", "fedavg", index)}, {})
    run.log(stages[1]).commit(0, {"metrics": rows("personalise", "lora", 0, ("a", "b", "c"))}, {})
    frame = run.metrics()
    assert list(frame.columns) == list(METRIC_COLUMNS)
    assert frame["stage"].tolist() == ["base"] * 4 + ["personalise"] * 3
    assert frame["round"].tolist() == [0, 0, 1, 1, 0, 0, 0]
    assert run.metrics("personalise")["client"].tolist() == ["a", "b", "c"]
    assert len(run.metrics("strategy")) == 0


def test_damaged_metrics_are_an_error_not_a_shorter_table(storage: Storage) -> None:
    run = RunFolder.create(storage, "r", CONFIG)
    run.set_stages([stage("base", "fedavg")])
    commit = run.log(stage("base", "fedavg")).commit(0, {"metrics": rows("base", "fedavg", 0)}, {})
    storage.write_bytes(f"{commit.path}/{commit.objects['metrics.parquet'].path}", b"")
    with pytest.raises(DamagedError, match=r"metrics.parquet is not what was committed"):
        run.metrics()


def test_strategies_are_found_by_method_seed_and_client(storage: Storage) -> None:
    run = RunFolder.create(storage, "r", CONFIG)
    stages = [
        stage("personalise", "fedp2eft"),
        stage("personalise", "lora"),
        stage("personalise", "fedp2eft", 52),
    ]
    run.set_stages(stages)
    for entry in stages:
        log = CommitLog(storage, f"artifacts/{entry['artifact']}")
        for index, client in enumerate(["seen/amh/00", "unseen/eng/01"]):
            lam = np.full((3, 2), index + entry["seed"], np.float32)
            strategies = {"strategies.safetensors": {f"lambda/{client}": lam}} if entry["method"] != "lora" else {}
            log.commit(index, {"metrics": rows("personalise", entry["method"], index), **strategies}, {})
    found = run.strategies()
    assert set(found) == {("fedp2eft", 42), ("fedp2eft", 52)}
    assert set(found["fedp2eft", 42]) == {"seen/amh/00", "unseen/eng/01"}
    np.testing.assert_array_equal(found["fedp2eft", 52]["unseen/eng/01"], np.full((3, 2), 53, np.float32))
