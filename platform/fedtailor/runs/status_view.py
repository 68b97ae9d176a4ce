"""``fedtailor status``: one run, all runs, or one run until it ends."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from fedtailor.runs.console import STATES, plain_table, status_table
from fedtailor.runs.pace import eta_text
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.status import EXIT_CODES, State, Status, all_states, status_of
from fedtailor.runs.storage import Storage

Show = Callable[[Status], None]
REFRESH_S = 2.0
_PAUSES = 5.0
"""Pause between two looks, at least so many times as long as one look took."""


def show_runs(console: Console, storage: Storage, as_json: bool) -> None:
    """All runs of a storage."""
    states = all_states(storage)
    if as_json:
        _print_json(console, [asdict(state) for state in states])
        return
    table = plain_table("run", "state", "updated", "message")
    for state in states:
        table.add_row(escape(state.run), _word(state), _ago(state.updated), Text(_first_line(state.message)))
    console.print(table if states else f"no runs in {escape(storage.url)}")


def show_run(console: Console, run: RunFolder, as_json: bool) -> None:
    """One run, now."""
    status = status_of(run)
    if as_json:
        _print_json(console, status.to_json())
    else:
        console.print(rendered(status))


def watch_run(console: Console, run: RunFolder, as_json: bool) -> int:
    """Shows a run until it ends, as JSON one line per look; returns the exit code of its state, see `EXIT_CODES`."""
    if as_json:
        return _until_the_end(run, lambda status: _print_json(console, status.to_json(), indent=None))
    with Live(console=console, auto_refresh=False) as live:
        return _until_the_end(run, lambda status: live.update(rendered(status), refresh=True))


def rendered(status: Status) -> RenderableType:
    """A run's state, its stages and the rest in a few lines."""
    rows = {
        "running": _pace(status),
        "recoveries": _recoveries(status),
        "rejected": ", ".join(f"{count} {kind}" for kind, count in sorted(status.rejected.items())),
        "driver": _driver(status.holder),
        "last event": f"{_ago(status.last_event['time'])}: {status.last_event['text']}" if status.last_event else "",
        "disk": _size(status.disk_bytes),
    }
    lines = [Text.assemble((f"  {name:<11}", "dim"), value) for name, value in rows.items() if value]
    head = Text.from_markup(f"[bold]{escape(status.run)}[/]  {_word(status)}  ") + Text(status.message)
    return Group(head, status_table(status.stages), *lines)


def _until_the_end(run: RunFolder, show: Show) -> int:
    while True:
        began = time.monotonic()
        status = status_of(run)
        show(status)
        if status.state in EXIT_CODES:
            return EXIT_CODES[status.state]
        time.sleep(max(REFRESH_S, _PAUSES * (time.monotonic() - began)))


def _pace(status: Status) -> str:
    if status.stage is None or status.clients_per_second is None:
        return ""
    return f"{status.stage}: {status.clients_per_second:.1f} clients/s, {eta_text(status.seconds_left)}"


def _recoveries(status: Status) -> str:
    lost = ", ".join(f"{count} {kind}" for kind, count in sorted(status.losses.items()))
    parts = [f"segments retried: {status.retries}"] if status.retries else []
    return ", ".join(parts + ([f"actors lost: {lost}"] if lost else []))


def _driver(holder: Mapping[str, object] | None) -> str:
    if holder is None:
        return ""
    known = {True: "alive", False: "gone", None: "on another machine"}[holder["present"]]  # type: ignore[index]
    return f"process {holder['pid']} on {holder['host']}, {known}, heartbeat {holder['silent_s']} s ago"


def _word(state: State) -> str:
    return f"[{STATES.get(state.state, 'white')}]{escape(state.state)}[/]"


def _first_line(text: str) -> str:
    return text.split("\n")[0]


def _ago(stamp: str) -> str:
    try:
        then = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{timedelta(seconds=max(0, round((datetime.now(UTC) - then).total_seconds())))} ago"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _print_json(console: Console, value: object, indent: int | None = 2) -> None:
    console.file.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    console.file.flush()
