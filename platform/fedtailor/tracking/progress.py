"""What a run shows while it works: a bar on a terminal, lines elsewhere, or JSON; at the end its warnings."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from fedtailor.core.errors import listed
from fedtailor.storage.journal import stamp
from fedtailor.tracking.events import Event, describe
from fedtailor.tracking.throughput import Throughput

LINE_EVERY_S = 10.0

SHOWN = 3


class Reporter(Protocol):
    """Receives the events of `experiment.execute.Execution`."""

    def __call__(self, event: Event) -> None:
        """Shows one event."""

    def close(self) -> None:
        """Leaves the terminal as it was and shows the warnings."""


@dataclass
class Notes:
    """Warnings and failures, gathered for the end of the run."""

    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Sentence to where it was seen."""
    failures: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Keeps a warning or failure for the end."""
        if event["kind"] == "warning":
            what = event["what"] if isinstance(event["what"], Mapping) else {"reason": event["what"]}
            who = str(what.get("client") or ", ".join(what.get("clients", ())))
            place = f"{who} ({event['stage']}, round {event['round']})".strip()
            self.warnings[str(what.get("reason", what))].append(place)
        elif event["kind"] == "failure":
            self.failures.append(f"{event['client']} ({event['stage']}, round {event['round']}): {event['reason']}")

    def show(self, console: Console) -> None:
        """Count and first few of each."""
        if self.failures:
            console.print(f"[bold red]{len(self.failures)} client failures[/], all in failures.jsonl:")
            for line in self.failures[:SHOWN]:
                console.print(f"  [red]•[/] {escape(line)}")
        total = sum(len(places) for places in self.warnings.values())
        if not total:
            return
        console.print(f"[yellow]{total} warnings[/] of {len(self.warnings)} kinds, all in events.jsonl:")
        for text, places in sorted(self.warnings.items(), key=lambda item: -len(item[1]))[:SHOWN]:
            console.print(f"  [yellow]•[/] {len(places)} x {escape(text)}: {escape(listed(places, SHOWN))}")


class JsonLog:
    """One JSON object per line and event, as ``events.jsonl`` has them.

    Args:
        console: console to write to.
        run_id: run of events that do not name one.
    """

    def __init__(self, console: Console, run_id: str) -> None:
        self._console, self._run_id, self._seq = console, run_id, 0

    def __call__(self, event: Event) -> None:
        """Prints the event with time, number and run."""
        stamped = stamp(event, self._run_id, self._seq)
        self._seq = stamped["seq"]
        self._console.file.write(json.dumps(stamped, ensure_ascii=False, default=str) + "\n")
        self._console.file.flush()

    def close(self) -> None:
        """Nothing is kept back."""


class Lines:
    """One line per stage, and one every ten seconds within it, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console, self._notes = console, Notes()
        self._throughput: Throughput | None = None
        self._said = 0.0

    def __call__(self, event: Event) -> None:
        """Prints what a reader of a log wants to know."""
        self._notes.add(event)
        throughput, now = self._throughput, time.monotonic()
        if event["kind"] == "stage":
            self._throughput = Throughput.of(event, now) if event["state"] == "running" else None
            if throughput is not None and event["state"] == "done":
                self._say(f"{_title(event)}  done in {throughput.elapsed(now)}, {throughput.rate(now)}")
            elif event["state"] != "done":
                self._say(f"{_title(event)}  {event['state']}")
            self._said = now
            return
        if throughput is not None and throughput.count(event) and event["kind"] == "progress":
            if now - self._said >= LINE_EVERY_S:
                self._said = now
                counted = f"{event['done']}/{event['total']} {throughput.unit}"
                self._say(f"{event['stage']}  {counted}  {throughput.rate(now)}  {throughput.eta(now)}")
        elif event["kind"] not in ("warning", "segment", "progress"):
            self._say(describe(event))

    def close(self) -> None:
        """Shows the warnings."""
        self._notes.show(self._console)

    def _say(self, text: str) -> None:
        self._console.print(Text(f"{datetime.now():%H:%M:%S}  {text}"), soft_wrap=True)


class Bar:
    """A live bar for the stage under way; finished stages become lines above it."""

    def __init__(self, console: Console) -> None:
        self._console, self._notes = console, Notes()
        self._throughput: Throughput | None = None
        self._task: TaskID | None = None
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  [cyan]{task.fields[rate]}[/]  {task.fields[eta]}"),
            console=console,
            transient=True,
        )
        self._bar.start()

    def __call__(self, event: Event) -> None:
        """Moves the bar."""
        self._notes.add(event)
        now = time.monotonic()
        if event["kind"] == "stage":
            self._stage(event, now)
            return
        self._advance(event, now)
        if event["kind"] == "failure":
            where = f"{event['client']}  {event['stage']}, round {event['round']}"
            self._console.print(f"[red]✗[/] {escape(where)}: {escape(str(event['reason']))}")
        elif event["kind"] not in ("warning", "segment", "progress"):
            self._console.print(Text(f"  {describe(event)}", style="dim"))

    def close(self) -> None:
        """Removes the bar and shows the warnings."""
        self._bar.stop()
        self._notes.show(self._console)

    def _stage(self, event: Event, now: float) -> None:
        title, throughput, state = _title(event), self._throughput, event["state"]
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task, self._throughput = None, None
        if state == "done" and throughput is not None:
            text = f"{throughput.elapsed(now)}  {throughput.rate(now)}" if throughput.done else "nothing was missing"
            self._console.print(f"[green]✓[/] {escape(title)}  [dim]{text}[/]")
        elif state == "reused":
            self._console.print(f"[green]✓[/] {escape(title)}  [dim]already there[/]")
        elif state in ("running", "checking", "preparing"):
            self._throughput = Throughput.of(event, now)
            unit = self._throughput.unit if state == "running" else ""
            self._task = self._bar.add_task(escape(title), total=None, unit=unit, rate="", eta="")

    def _advance(self, event: Event, now: float) -> None:
        throughput = self._throughput
        if throughput is None or self._task is None or not throughput.count(event):
            return
        self._bar.update(self._task, rate=throughput.rate(now))
        if event["kind"] == "progress":
            self._bar.update(self._task, completed=throughput.done, total=throughput.total, eta=throughput.eta(now))


def reporter(console: Console, json_log: bool = False, run_id: str = "") -> Reporter:
    """The fitting reporter: JSON if asked for, a bar on a terminal, lines elsewhere."""
    if json_log:
        return JsonLog(console, run_id)
    return Bar(console) if console.is_terminal else Lines(console)


def _title(event: Event) -> str:
    number = f"[{event['number']}/{event['of']}] " if "number" in event else ""
    return f"{number}{event['stage']}"
