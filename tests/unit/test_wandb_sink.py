"""W&B holds what Parquet holds: one run per experiment, rebuilt from commits, and never in a run's way."""

from __future__ import annotations

import json
import struct
from collections import defaultdict
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as records

from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.core.messages import metric_row
from fedtailor.runs import wandb_sink
from fedtailor.runs.experiment import compose, to_json
from fedtailor.runs.launch import sync_wandb
from fedtailor.runs.round_log import METRICS, metrics_table
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.storage import Storage

CANARY = "canary" + "0123456789abcdef" * 2
WORDS = ("methods=[base,lora]", "budgets=[2,4]", "r_max=4", "wandb.mode=offline")
STAGES = [
    {"key": "base/seed42", "kind": "base", "method": "fedavg", "seed": 42, "artifact": "base-1", "rounds": 2},
    {
        "key": "personalise/lora/seed42",
        "kind": "personalise",
        "method": "lora",
        "seed": 42,
        "artifact": "p-1",
    },
]


@pytest.fixture(autouse=True)
def _canary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run with two rounds of a base stage and one chunk of personalised clients."""
    folder = RunFolder.create(Storage(tmp_path), "mine", to_json(compose([], [*WORDS, f"storage={tmp_path}"])))
    folder.set_stages(STAGES)
    for number, losses in enumerate(([1.0, 3.0], [0.5, 2.0])):
        rows = [
            metric_row(stage="base", method="fedavg", seed=42, round=number, pool="seen", language="swa",
                       client=f"seen/swa/0{i}", metric="train_loss", value=loss, weight=weight)
            for i, (loss, weight) in enumerate(zip(losses, (30.0, 10.0), strict=True))
        ]  # fmt: skip
        folder.log(STAGES[0]).commit(number, {METRICS: metrics_table(rows)}, {"kind": "round"})
    rows = [
        metric_row(stage="personalise", method="lora", seed=42, pool="seen", language=language, budget=budget,
                   client=f"seen/{language}/00", metric="accuracy", value=value, weight=weight)
        for language, budget, value, weight in (
            ("swa", 2, 0.50, 10), ("yor", 2, 0.25, 40), ("swa", 4, 0.75, 10), ("yor", 4, 1.0, 40),
        )
    ]  # fmt: skip
    folder.log(STAGES[1]).commit(0, {METRICS: metrics_table(rows)}, {"kind": "chunk"})
    return folder


def offline_runs(run: RunFolder) -> list[Path]:
    return sorted((run.storage.local_path(run.run_id) / "wandb").iterdir())


def read(folder: Path) -> dict[str, list[Any]]:
    """All records of an offline run's file: a header of 7 bytes, then a LevelDB log of protobuf records."""
    data = next(folder.glob("*.wandb")).read_bytes()
    found: dict[str, list[Any]] = defaultdict(list)
    at, part = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or last piece
            record = records.Record()
            record.ParseFromString(part)
            name = str(record.WhichOneof("record_type"))
            found[name].append(getattr(record, name))
            part = b""
    return found


def items(record: Any) -> dict[str, Any]:
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record}


def test_an_offline_sync_makes_one_run_with_group_config_and_step(run: RunFolder) -> None:
    told = wandb_sink.sync(run, "offline")
    (folder,) = offline_runs(run)
    assert told == str(folder)
    assert folder.name.startswith("offline-run-")
    (header,) = read(folder)["run"]
    assert (header.run_group, header.display_name, header.project) == (
        "cldr x tiny-bert",
        "mine",
        "fedtailor",
    )
    config = {u.key: json.loads(u.value_json) for u in header.config.update}
    assert {key: config[key] for key in ("budgets", "methods")} == {
        "budgets": [2, 4],
        "methods": ["base", "lora"],
    }
    metrics = read(folder)["metric"]
    assert "round" in {m.name for m in metrics}
    assert {m.step_metric for m in metrics if m.glob_name == "*"} == {"round"}


def test_curves_are_the_weighted_means_of_the_committed_rows(run: RunFolder) -> None:
    wandb_sink.sync(run, "offline")
    points = [items(record.item) for record in read(offline_runs(run)[0])["history"]]
    curve = [(p["round"], p["base/seed42/train_loss"]) for p in points if "base/seed42/train_loss" in p]
    assert curve == [(0, (30 * 1.0 + 10 * 3.0) / 40), (1, (30 * 0.5 + 10 * 2.0) / 40)]


def test_the_summary_holds_the_accuracy_of_every_pool_method_and_budget(run: RunFolder) -> None:
    wandb_sink.sync(run, "offline")
    summary: dict[str, Any] = {}
    for record in read(offline_runs(run)[0])["summary"]:
        summary |= items(record.update)
    final = {key: value for key, value in summary.items() if key.startswith("final/")}
    assert final == {"final/seen/lora/r2/accuracy": 0.375, "final/seen/lora/r4/accuracy": 0.875}


def test_results_per_language_are_a_table(run: RunFolder) -> None:
    wandb_sink.sync(run, "offline")
    (file,) = offline_runs(run)[0].rglob("results*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    found = {(row["language"], row["budget"]): row["mean"] for row in rows}
    assert found == {
        ("swa", 2): 0.5, ("yor", 2): 0.25, ("average", 2): 0.375, ("swa", 4): 0.75, ("yor", 4): 1.0,
        ("average", 4): 0.875,
    }  # fmt: skip


def test_a_second_sync_replaces_the_first(run: RunFolder) -> None:
    first = wandb_sink.sync(run, "offline")
    rows = [metric_row(stage="base", method="fedavg", seed=42, round=2, metric="train_loss", value=4.0, weight=1.0)]
    run.log(STAGES[0]).commit(2, {METRICS: metrics_table(rows)}, {"kind": "round"})
    wandb_sink.sync(run, "offline")
    (folder,) = offline_runs(run)
    points = [items(record.item) for record in read(folder)["history"]]
    assert [p["round"] for p in points if "base/seed42/train_loss" in p] == [0, 1, 2]
    assert folder.name.rsplit("-", 1)[1] == Path(first).name.rsplit("-", 1)[1], "the id must not change"
    assert [p.name for p in run.storage.local_path(run.run_id).glob(".wandb-*")] == []


def test_the_key_is_in_no_file(run: RunFolder) -> None:
    assert sync_wandb(run, compose([], [*WORDS])) is None
    files = [path for path in run.storage.local_path().rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []


def test_a_failing_wandb_is_told_and_kept_as_an_event_and_fails_nothing(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise ConnectionError("W&B is down")

    monkeypatch.setattr("wandb.init", broken)
    assert sync_wandb(run, compose([], [*WORDS])) == "ConnectionError: W&B is down"
    assert [e["text"] for e in run.events() if e["kind"] == "wandb"] == ["ConnectionError: W&B is down"]
    assert not (run.storage.local_path(run.run_id) / "wandb").exists()


def test_a_failing_sync_keeps_the_offline_run_before_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb_sink.sync(run, "offline")
    before = offline_runs(run)
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        wandb_sink.sync(run, "offline")
    assert offline_runs(run) == before


def test_nothing_happens_when_wandb_is_disabled(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb_sink, "sync", lambda *_: pytest.fail("W&B was used"))
    assert sync_wandb(run, compose([], ["wandb.mode=disabled"])) is None
    assert run.events() == []


def test_online_without_a_key_says_where_keys_are_looked_for(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="set WANDB_API_KEY or WANDB_API_KEY_FILE"):
        wandb_sink.sync(run, "online")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY_FILE: .*none cannot be read"):
        wandb_sink.sync(run, "online")


def test_a_run_without_commits_cannot_be_synced(tmp_path: Path) -> None:
    empty = RunFolder.create(Storage(tmp_path), "empty", to_json(compose([], [])))
    with pytest.raises(StorageError, match="no committed metrics yet"):
        wandb_sink.sync(empty, "offline")


@pytest.mark.parametrize("server", ["https://wandb.example.org", None])
def test_the_key_is_found_in_netrc_under_the_server_that_is_used(
    server: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_API_KEY_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    if server:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    host = urlparse(wandb.Settings().base_url).hostname
    (tmp_path / ".netrc").write_text(f"machine {host}\n  login user\n  password {'k' * 40}\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_sink._api_key() == "k" * 40
