"""Status of a run, read from its folder: state, stages, speed, losses, the process that drives it, disk."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedtailor.storage.files import MissingFileError, Storage
from fedtailor.storage.lock import STALE_S, LockHolder, lock_holder
from fedtailor.storage.run_folder import RunFolder, committed_stages, run_ids
from fedtailor.tracking.events import describe, name_of

DEAD = "dead"
"""State of a run whose status file says running, and whose process is gone."""

EXIT_CODES: Mapping[str, int] = {"complete": 0, "failed": 1, DEAD: 1, "interrupted": 130}
"""State at which a run has ended to the exit code of ``status --watch``."""

SILENT_S = 600.0
"""Seconds after which a run of another machine that holds no lock counts as dead."""


@dataclass(frozen=True)
class State:
    """State of a run, and the process that drives it.

    Args:
        run: its id.
        state: running, complete, failed, interrupted or `DEAD`.
        message: why.
        updated: when the status file was written.
        holder: host, pid, silent_s (since its last heartbeat) and present (None: cannot be known here) of the
            process that has the run's lock; None if none has.
    """

    run: str
    state: str
    message: str
    updated: str
    holder: Mapping[str, Any] | None


@dataclass(frozen=True)
class Status(State):
    """Everything that ``fedtailor status RUN`` tells.

    Args:
        stages: key, committed, total (0: not known yet), done and artifact of each.
        stage: key of the stage under way.
        clients_per_second: speed of that stage since its process took it up; None where nothing runs.
        seconds_left: until that stage's end.
        retries: segments that were lost and went out again, so far.
        losses: actors lost, by kind.
        rejected: results of clients that did not count, by kind: rejected or exception.
        events_given_up: oldest events that are no longer kept.
        last_event: time, and text in one line.
        disk_bytes: bytes of the run's folder and the artifacts of its stages, which other runs may share.
    """

    stages: tuple[Mapping[str, Any], ...]
    stage: str | None
    clients_per_second: float | None
    seconds_left: float | None
    retries: int
    losses: Mapping[str, int]
    rejected: Mapping[str, int]
    events_given_up: int
    last_event: Mapping[str, str] | None
    disk_bytes: int


def state_of(run: RunFolder) -> State:
    """State, and who drives the run."""
    try:
        stored = run.status()
    except MissingFileError:
        stored = {"state": "created", "message": "", "updated": "", "progress": {}}
    held = lock_holder(run.storage, run.run_id)
    state, message, holder = str(stored["state"]), str(stored["message"]), None
    if state == "running" and (gone := _gone(stored, held)):
        state, message = DEAD, f"stopped without a word: {gone}; go on with: fedtailor resume {run.run_id}"
    if held is not None:
        process, silent_s = held
        holder = {
            "host": process.host, "pid": process.pid, "present": process.present, "silent_s": round(silent_s, 1),
        }  # fmt: skip
    return State(run.run_id, state, message, str(stored["updated"]), holder)


def all_states(storage: Storage) -> list[State]:
    """The state of every run, by id."""
    return [state_of(RunFolder.open(storage, run_id)) for run_id in run_ids(storage)]


def status_of(run: RunFolder) -> Status:
    """Everything about a run; reads its event lines, so it is for people and not for every second."""
    state, stages = state_of(run), committed_stages(run)
    events, progress = run.events.entries(), run.progress()
    readable = [(name_of(event), event) for event in events if "kind" in event]
    done = {stage["key"] for stage in stages if stage["done"]}
    here = state.state == "running" and progress.get("stage") not in {None, *done}
    last = events[-1] if events else {}
    text = describe(last) if "kind" in last else str(last.get("unreadable", ""))
    folders = [run.run_id, *dict.fromkeys(f"artifacts/{stage['artifact']}" for stage in stages)]
    return Status(
        **vars(state),
        stages=tuple({key: s[key] for key in ("key", "committed", "total", "done", "artifact")} for s in stages),
        stage=str(progress["stage"]) if here else None,
        clients_per_second=progress["clients_per_second"] if here else None,
        seconds_left=progress["seconds_left"] if here else None,
        retries=sum(name == "pool/job_retried" for name, _ in readable),
        losses=dict(Counter(str(event["how"]) for name, event in readable if name == "pool/actor_lost")),
        rejected=dict(Counter(str(entry.get("kind")) for entry in run.failures.entries())),
        events_given_up=max(0, int(events[0].get("seq", 1)) - 1) if events else 0,
        last_event={"time": str(last.get("time", "")), "text": text} if events else None,
        disk_bytes=sum(run.storage.size(folder) for folder in folders),
    )


def _gone(stored: Mapping[str, Any], held: tuple[LockHolder, float] | None) -> str | None:
    """Who is gone, as a clause; None while somebody drives the run or may do so."""
    if held is not None:
        holder, silent_s = held
        # Of another machine's process only its silence is known.
        gone = silent_s > STALE_S if holder.present is None else not holder.present
        return f"process {holder.pid} on {holder.host} is gone" if gone else None
    # Before it takes the lock and after it gave it back, a run is driven by the process that was started for it.
    launcher = (stored.get("progress") or {}).get("launcher")
    starter = LockHolder(**launcher) if launcher else None
    if starter is not None and starter.present is not None:
        return None if starter.present else f"process {starter.pid} on {starter.host} is gone"
    age = time.time() - datetime.fromisoformat(stored["updated"]).astimezone(UTC).timestamp()
    return f"nobody has its lock, and its state is {age / 60:.0f} minutes old" if age > SILENT_S else None
