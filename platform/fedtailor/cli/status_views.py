"""What `status` shows; imports nothing that takes long, so that looking at a run costs next to nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from fedtailor.cli.terminal import plain_table
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.progress import eta_text
from fedtailor.tracking.status import EXIT_CODES, State, Status, all_states, status_of

STATES = {
    "complete": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "dead": "bold red",
    "created": "dim",
}  # fmt: skip

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
        table.add_row(escape(state.run), _word(state), _ago(state.updated), Text(state.message.partition("\n")[0]))
    console.print(table if states else f"no runs in {escape(storage.url)}")


def show_run(console: Console, run: RunFolder, as_json: bool = False, watch: bool = False) -> int:
    """Shows a run, now or until it ends (as JSON one line per look); returns the exit code of `status --watch`."""
    with Live(console=console, auto_refresh=False) if watch and not as_json else nullcontext() as live:
        while True:
            began = time.monotonic()
            status = status_of(run)
            if as_json:
                _print_json(console, asdict(status), None if watch else 2)
            elif live is not None:
                live.update(rendered(status), refresh=True)
            else:
                console.print(rendered(status))
            if not watch or status.state in EXIT_CODES:
                return EXIT_CODES.get(status.state, 0)
            time.sleep(max(REFRESH_S, _PAUSES * (time.monotonic() - began)))


def rendered(status: Status) -> RenderableType:
    """A run's state, its stages and the rest in a few lines."""
    table = plain_table("stage", "committed", "artifact", numbers=("committed",))
    for stage in status.stages:
        committed = f"{stage['committed']}/{stage['total']}" if stage["total"] else str(stage["committed"])
        mark = "[green]done[/] " if stage["done"] else ""
        table.add_row(escape(stage["key"]), mark + committed, stage["artifact"])
    running = driver = ""
    if status.clients_per_second is not None:
        running = f"{status.stage}: {status.clients_per_second:.1f} clients/s, {eta_text(status.seconds_left)}"
    if (holder := status.holder) is not None:
        known = {True: "alive", False: "gone", None: "on another machine"}[holder["present"]]
        driver = f"process {holder['pid']} on {holder['host']}, {known}, heartbeat {holder['silent_s']} s ago"
    recoveries = {"segments retried": str(status.retries or ""), "actors lost": _counts(status.losses)}
    last = status.last_event
    rows = {
        "running": running,
        "recoveries": ", ".join(f"{what}: {counts}" for what, counts in recoveries.items() if counts),
        "rejected": _counts(status.rejected),
        "driver": driver,
        "last event": f"{_ago(last['time'])}: {last['text']}" if last else "",
        "disk": decimal(status.disk_bytes),
    }
    lines = [Text.assemble((f"  {name:<11}", "dim"), value) for name, value in rows.items() if value]
    head = Text.from_markup(f"[bold]{escape(status.run)}[/]  {_word(status)}  ") + Text(status.message)
    return Group(head, table, *lines)


def _counts(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))


def _word(state: State) -> str:
    return f"[{STATES.get(state.state, 'white')}]{escape(state.state)}[/]"


def _ago(stamp: str) -> str:
    try:
        then = datetime.fromisoformat(stamp)
    except ValueError:
        return stamp
    return f"{timedelta(seconds=max(0, round((datetime.now(UTC) - then).total_seconds())))} ago"


def _print_json(console: Console, value: object, indent: int | None = 2) -> None:
    console.file.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
    console.file.flush()
