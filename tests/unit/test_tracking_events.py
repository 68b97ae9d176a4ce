"""Events: one schema for the kept and the shown ones, ordered by number and bounded on disk."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from event_schema import problems
from rich.console import Console
from tiny import open_run, tiny

from fedtailor.core.config import resolve
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment import launch
from fedtailor.federated.pool import OnEvent, Pool
from fedtailor.storage import journal
from fedtailor.storage.files import Storage
from fedtailor.storage.journal import Journal
from fedtailor.tracking.events import KINDS, QUIET, describe, name_of
from fedtailor.tracking.progress import reporter
from fedtailor.worker.worker import SerialPool, Worker

SMALL = ("methods=[lora]", "base.rounds=2", "personalise.chunk=9", "engine.on_client_failure=drop", "engine.quorum=0.3")
RETRIED = {
    "event": "job_retried", "stage": "base/seed42", "round": 0, "segment": 0, "clients": ["a"], "attempt": 1,
    "actor": 0, "host": "h", "reason": "death",
}  # fmt: skip


class TroubledPool(SerialPool):
    """Fails one client of every round and tells of a retry, as a pool of actors would."""

    def __init__(self, config: EngineConfig, on_event: OnEvent) -> None:
        super().__init__(config, on_event)
        self._worker, self._on_event = BreakingWorker(), on_event

    def run(self, *call: Any, **named: Any) -> list[SegmentResult]:
        self._on_event(RETRIED)
        results = super().run(*call, **named)
        results[0].warnings.append({"kind": "client-warning", "client": "a", "reason": "few examples"})
        return results


class BreakingWorker(Worker):
    """Cannot do the first client of segment 0 of a round stage."""

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        assert self._stage is not None
        broken = job.clients[0] if job.index == 0 and job.stage.startswith("base") else None
        context = self._stage.context

        def failing(clients: Any, *rest: Any) -> Any:
            if broken in clients:
                raise ValueError("no examples")
            return context(clients, *rest)

        self._stage.context = failing  # type: ignore[method-assign]
        try:
            return super().run(job, shared)
        finally:
            self._stage.context = context  # type: ignore[method-assign]


def run_shown(storage: Path, pool: Callable[[EngineConfig, OnEvent], Pool] = SerialPool) -> tuple[Any, list[Any]]:
    exp = tiny(storage, *SMALL)
    run, shown = open_run(exp), []

    def backend(entry: str, payload: Any, config: Any, on_event: OnEvent, should_stop: Any) -> None:
        resolve(entry)(payload, pool, on_event, should_stop)

    launch.launch(backend, run, exp, shown.append, lambda: False)
    return run, shown


def test_every_event_of_a_run_with_failures_and_retries_is_as_the_table_says(tmp_path: Path) -> None:
    run, shown = run_shown(tmp_path, TroubledPool)
    assert [told for event in shown for told in problems(event)] == []
    assert {name_of(e) for e in shown} >= {"stage", "segment", "progress", "failure", "warning", "pool/job_retried"}
    assert run.events.entries() == [event for event in shown if name_of(event) not in QUIET]
    assert [event["seq"] for event in run.events.entries()] == list(range(1, len(run.events.entries()) + 1))
    assert {event["run"] for event in shown} == {"run"}
    _, again = run_shown(tmp_path)
    assert again[0]["seq"] == len([e for e in shown if name_of(e) not in QUIET]) + 1


def test_what_a_client_cost_is_kept_beside_its_seconds(tmp_path: Path) -> None:
    run, _ = run_shown(tmp_path, TroubledPool)
    times = run.timings()
    base = times[times["stage"] == "base/seed42"]
    failed = base[base["bytes_up"] == 0]
    assert len(failed) == 2, "one client of each round"
    assert set(base["bytes_down"]) == {base["bytes_up"].max()}
    personal = times[times["stage"] == "personalise/lora/seed42"]
    assert (personal[["bytes_down", "bytes_up"]] == 0).all(axis=None), "a client-only method"
    manifest = run.manifest(42)
    sizes = {client["id"]: client["n_train"] for client in manifest["clients"]}
    assert dict(zip(personal["client"], personal["examples"], strict=True)) == sizes
    read = personal["examples"] * len(run.info()["config"]["budgets"])  # one epoch at each budget
    assert (personal["tokens"] >= 3 * read).all(), "a word between [CLS] and [SEP] at least"
    assert (personal["tokens"] <= 16 * read).all(), "task.max_length, and no padding"
    assert (times["peak_rss"] > 50e6).all()
    assert set(times["actor"]) == {-1}
    assert set(times["attempt"]) == {0}


def test_a_reader_of_times_that_an_earlier_version_kept_finds_blanks(tmp_path: Path) -> None:
    import pyarrow as pa

    from fedtailor.storage.round_store import TIMING_COLUMNS, TIMING_SCHEMA, frame_of, timings_table

    old = pa.table({"stage": ["s"], "round": [0], "client": ["a"], "seconds": [1.5]})
    new = timings_table("s", 1, {"a": 2.5}, {})
    frame = frame_of([old, new], TIMING_SCHEMA)
    assert tuple(frame.columns) == TIMING_COLUMNS
    assert frame["seconds"].tolist() == [1.5, 2.5]
    assert frame["tokens"].isna().all()


@pytest.fixture(params=["local", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return Storage(tmp_path if request.param == "local" else f"memory://{tmp_path.name}")


def test_a_full_file_is_cut_and_the_oldest_lines_go_in_the_open(storage: Storage) -> None:
    kept = Journal(storage, "r", "events", limit=1000, kept=2)
    for number in range(100):
        kept.append({"kind": "note", "text": f"{number}"})
    names = storage.list("r")
    assert len(names) == 3
    assert storage.size("r") < 3 * 1100
    lines = kept.entries()
    first = lines[0]["seq"]
    assert first > 1, "the first number tells how many were given up"
    assert [line["seq"] for line in lines] == list(range(first, 101))
    assert [line["text"] for line in lines] == [str(seq - 1) for seq in range(first, 101)]


def test_a_restart_goes_on_with_the_number_even_right_after_a_cut(storage: Storage) -> None:
    for number in range(30):
        line = Journal(storage, "r", "events", limit=300).append({"kind": "note", "text": "x" * 60})
        assert line["seq"] == number + 1
    newest = max(int(name.split(".")[1]) for name in storage.list("r") if name != "events.jsonl")
    storage.move("r/events.jsonl", f"r/events.{newest + 1}.jsonl")
    assert Journal(storage, "r", "events", limit=300).append({"kind": "note"})["seq"] == 31


def test_a_torn_line_is_a_hole_and_lines_without_a_number_are_counted(storage: Storage) -> None:
    storage.append("r/events.jsonl", '{"time": "", "kind": "stage"}\n{"time": "", "kind": "stage"}\n')
    Journal(storage, "r", "events").append({"kind": "note"})
    storage.append("r/events.jsonl", '{"time": "2026')
    last = Journal(storage, "r", "events")
    last.append({"kind": "note"})
    assert [line.get("seq") for line in last.entries()] == [None, None, 3, None, 5]


def test_two_processes_may_write_in_turns(tmp_path: Path) -> None:
    one, two = (Journal(Storage(tmp_path), "r", "events") for _ in range(2))
    assert [writer.append({"kind": "note"})["seq"] for writer in (one, two, two, one)] == [1, 2, 3, 4]


def test_order_is_by_number_when_the_clock_jumps_back(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Journal(storage, "r", "events")
    for hour in (9, 8, 10):
        monkeypatch.setattr(journal, "utc_now", lambda hour=hour: f"2026-01-01T{hour:02d}:00:00+00:00")
        kept.append({"kind": "note", "text": str(hour)})
    lines = kept.entries()
    assert [line["text"] for line in sorted(lines, key=lambda line: line["seq"])] == ["9", "8", "10"]


def test_the_json_log_gives_the_same_schema_to_its_own_notes() -> None:
    console = Console(file=io.StringIO(), width=200)
    show = reporter(console, json_log=True, run_id="r1")
    show({"time": "t", "seq": 7, "run": "r1", "kind": "stage", "stage": "base/seed1", "state": "running"})
    show({"kind": "note", "text": "stopping"})
    lines = [json.loads(line) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert [problem for line in lines for problem in problems(line)] == []
    assert [(line["seq"], line["run"]) for line in lines] == [(7, "r1"), (7, "r1")]


def test_lines_and_bar_tell_of_retries_in_words() -> None:
    retried = {"kind": "pool", "how": "", **RETRIED}
    for terminal in (False, True):
        console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
        show = reporter(console)
        show({"kind": "stage", "stage": "base/seed42", "state": "running", "number": 1, "of": 1})
        show(retried)
        show({"kind": "segment", "stage": "base/seed42", "clients": 3})
        show({"kind": "progress", "stage": "base/seed42", "done": 1, "total": 1, "clients": 3})
        show({"kind": "stage", "stage": "base/seed42", "state": "done", "number": 1, "of": 1})
        show.close()
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "base/seed42, round 0: segment 0 goes out again (attempt 1) after: death" in text
        assert "1 retry" in text


def test_each_sentence_of_the_table_uses_keys_that_its_events_have() -> None:
    for name, kind in KINDS.items():
        event, _, form = name.partition("/")
        keys = dict.fromkeys((key.rstrip("?") for key in kind.keys.split()), "@")
        said = describe({"time": "t", "seq": 1, "run": "r", "kind": event, **({"event": form} if form else {}), **keys})
        assert said.count("@") == (kind.text.count("{") or said.count("@")), name


def test_an_event_that_is_not_in_the_table_is_noticed() -> None:
    stamp = {"time": "t", "seq": 1, "run": "r"}
    assert problems({**stamp, "kind": "pool", "event": "actor_lots"}) == ["pool/actor_lots: not in the table of events"]
    assert problems({**stamp, "kind": "wandb", "pace": 2}) == ["wandb: no 'state'", "wandb: 'pace' is not documented"]
    assert problems({"kind": "note", "text": "x"}) == [f"event without '{key}'" for key in ("time", "seq", "run")]
