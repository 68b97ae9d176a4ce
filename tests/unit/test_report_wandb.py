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

from fedtailor.core.errors import ConfigError, StorageError, TrackingError
from fedtailor.core.messages import metric_row
from fedtailor.core.settings import WandbConfig
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import to_json
from fedtailor.experiment.prepare import prepare
from fedtailor.report.wandb import series, settled, sync_run, sync_wandb
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import Lock
from fedtailor.storage.round_store import METRIC_SCHEMA, METRICS, table_of
from fedtailor.storage.run_folder import DONE, RunFolder
from fedtailor.tracking import wandb_key

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
        folder.log(STAGES[0]).commit(number, {METRICS: table_of(rows, METRIC_SCHEMA)}, {"kind": "round"})
    rows = [
        metric_row(stage="personalise", method="lora", seed=42, pool="seen", language=language, budget=budget,
                   client=f"seen/{language}/00", metric="accuracy", value=value, weight=weight)
        for language, budget, value, weight in (
            ("swa", 2, 0.50, 10), ("yor", 2, 0.25, 40), ("swa", 4, 0.75, 10), ("yor", 4, 1.0, 40),
        )
    ]  # fmt: skip
    folder.log(STAGES[1]).commit(0, {METRICS: table_of(rows, METRIC_SCHEMA)}, {"kind": "chunk"})
    return folder


def sync(run: RunFolder, asked: str | None = "offline", **config: Any) -> str:
    return sync_run(run, WandbConfig(**config), asked)


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
    told = sync(run)
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
    sync(run)
    points = [items(record.item) for record in read(offline_runs(run)[0])["history"]]
    curve = [(p["round"], p["base/seed42/train_loss"]) for p in points if "base/seed42/train_loss" in p]
    assert curve == [(0, (30 * 1.0 + 10 * 3.0) / 40), (1, (30 * 0.5 + 10 * 2.0) / 40)]


def test_the_summary_holds_the_accuracy_of_every_pool_method_and_budget(run: RunFolder) -> None:
    sync(run)
    summary: dict[str, Any] = {}
    for record in read(offline_runs(run)[0])["summary"]:
        summary |= items(record.update)
    final = {key: value for key, value in summary.items() if key.startswith("final/")}
    assert final == {"final/seen/lora/r2/accuracy": 0.375, "final/seen/lora/r4/accuracy": 0.875}


def test_results_per_language_are_a_table(run: RunFolder) -> None:
    sync(run)
    (file,) = offline_runs(run)[0].rglob("results*.table.json")
    table = json.loads(file.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    found = {(row["language"], row["budget"]): row["mean"] for row in rows}
    assert found == {
        ("swa", 2): 0.5, ("yor", 2): 0.25, ("average", 2): 0.375, ("swa", 4): 0.75, ("yor", 4): 1.0,
        ("average", 4): 0.875,
    }  # fmt: skip


def test_a_second_sync_replaces_the_first(run: RunFolder) -> None:
    first = sync(run)
    rows = [metric_row(stage="base", method="fedavg", seed=42, round=2, metric="train_loss", value=4.0, weight=1.0)]
    run.log(STAGES[0]).commit(2, {METRICS: table_of(rows, METRIC_SCHEMA)}, {"kind": "round"})
    sync(run)
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
    assert [e["text"] for e in run.events.entries() if e["kind"] == "wandb"] == ["ConnectionError: W&B is down"]
    assert not (run.storage.local_path(run.run_id) / "wandb").exists()


def test_a_failing_sync_keeps_the_offline_run_before_it(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    sync(run)
    before = offline_runs(run)
    monkeypatch.setattr("wandb.init", lambda **_: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(TrackingError, match="OSError: no"):
        sync(run)
    assert offline_runs(run) == before


def test_nothing_happens_when_wandb_is_disabled(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtailor.report.wandb.sync_run", lambda *_: pytest.fail("W&B was used"))
    assert sync_wandb(run, compose([], ["wandb.mode=disabled"])) is None
    assert run.events.entries() == []


def test_online_without_a_key_says_where_keys_are_looked_for(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="set WANDB_API_KEY or WANDB_API_KEY_FILE"):
        sync(run, "online")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=r"WANDB_API_KEY_FILE: .*none cannot be read"):
        sync(run, "online")


def test_a_run_without_commits_cannot_be_synced(tmp_path: Path) -> None:
    empty = RunFolder.create(Storage(tmp_path), "empty", to_json(compose([], [])))
    with pytest.raises(StorageError, match="no committed metrics yet"):
        sync(empty)


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
    assert wandb_key.api_key() == "k" * 40


def finish(run: RunFolder, *stages: dict[str, Any]) -> None:
    for stage in stages:
        run.storage.write_json(f"artifacts/{stage['artifact']}/{DONE}", {"stage": stage["key"], "modules": []})


def test_group_tags_and_job_type_are_the_configurations(run: RunFolder) -> None:
    sync(run, group="sweep-7", tags=("a", "b"), job_type="trial")
    (header,) = read(offline_runs(run)[0])["run"]
    assert (header.run_group, list(header.tags), header.job_type) == ("sweep-7", ["a", "b"], "trial")


def test_figures_are_images_once_the_run_is_complete(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    report = run.storage.local_path(run.run_id) / "report"
    report.mkdir()
    (report / "report.html").write_text("")
    Image.new("RGB", (2, 2)).save(report / "curves.png")
    sync(run, artifacts=("figures",))
    assert not list(offline_runs(run)[0].rglob("*.png"))
    finish(run, *STAGES)
    sync(run, artifacts=("figures",))
    points = [items(record.item) for record in read(offline_runs(run)[0])["history"]]
    (image,) = [p["figures/curves/path"] for p in points if "figures/curves/path" in p]
    assert (offline_runs(run)[0] / "files" / image).read_bytes() == (report / "curves.png").read_bytes()


def test_no_point_is_sent_before_one_that_a_later_sync_must_send(run: RunFolder) -> None:
    """Steps grow: what comes behind an unfinished stage has to wait, even if another run has made it already."""
    later = {"key": "strategy/fedp2eft/seed42", "kind": "strategy", "method": "fedp2eft", "seed": 42,
             "artifact": "s-1", "rounds": 1}  # fmt: skip
    run.set_stages([STAGES[0], later, STAGES[1]])
    row = metric_row(stage="strategy", method="fedp2eft", seed=42, round=0, metric="psg_loss", value=1.0, weight=1.0)
    run.log(later).commit(0, {METRICS: table_of([row], METRIC_SCHEMA)}, {"kind": "round"})
    early = list(series(settled(run, run.metrics())))
    assert [key for point in early for key in point if key != "round"] == ["base/seed42/train_loss"] * 2
    finish(run, STAGES[0])
    full = list(series(settled(run, run.metrics())))
    assert full[:2] == early
    assert full[2:] == [{"round": 0, "strategy/fedp2eft/seed42/psg_loss": 1.0}]


def test_two_syncs_at_once_are_refused(run: RunFolder) -> None:
    with Lock(run.storage, f"{run.run_id}/wandb.lock", "other"), pytest.raises(StorageError, match="run 'other'"):
        sync(run)


def test_what_a_killed_sync_left_is_removed(run: RunFolder) -> None:
    left = run.storage.local_path(run.run_id) / ".wandb-killed"
    left.mkdir()
    sync(run)
    assert not left.exists()


@pytest.mark.parametrize(("told", "key", "mode"), [("online", True, "online"), ("online", False, "offline"),
                                                   ("offline", True, "offline"), (None, True, "online")])  # fmt: skip
def test_auto_is_online_with_a_key_unless_wandb_mode_says_otherwise(
    told: str | None, key: bool, mode: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_MODE")
    if told:
        monkeypatch.setenv("WANDB_MODE", told)
    if not key:
        monkeypatch.delenv("WANDB_API_KEY")
    assert wandb_key.settled_mode("auto") == mode


def test_a_disabled_run_can_be_synced_later(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert sync(run, None, mode="disabled") == str(offline_runs(run)[0])


def checked(overrides: list[str]) -> None:
    exp = compose([], overrides)
    wandb_key.check_wandb(exp.wandb, exp.save_adapters)


def test_a_missing_key_is_found_before_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY")
    online = compose([], ["wandb.mode=online", f"storage={tmp_path / 'runs'}"])
    with pytest.raises(ConfigError, match="needs a key: set WANDB_API_KEY"):
        prepare(online, "mine", lambda _: None)
    assert not (tmp_path / "runs").exists()
    checked(["wandb.mode=auto"])
    empty = tmp_path / "key"
    empty.write_text("\n")
    monkeypatch.setenv("WANDB_API_KEY_FILE", str(empty))
    monkeypatch.delenv("WANDB_MODE")
    with pytest.raises(ConfigError, match="key is empty"):
        checked(["wandb.mode=auto"])


def test_adapters_that_will_not_be_kept_are_found_before_the_run() -> None:
    with pytest.raises(ConfigError, match="only there with save_adapters=true"):
        checked(["wandb.artifacts=[adapters]"])


@pytest.mark.parametrize("word", ["entity={}", "project={}", "group=x-{}", "tags=[a,{}]", "job_type={}"])
@pytest.mark.parametrize("key", ["0123456789abcdef0123456789abcdef01234567", "wandb_v1_abcdefghijklmnop"])
def test_a_key_in_the_configuration_is_refused_and_not_repeated(word: str, key: str) -> None:
    with pytest.raises(ConfigError, match="looks like a key") as told:
        compose([], ["wandb." + word.format(key)])
    assert key not in str(told.value)
