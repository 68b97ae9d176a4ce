"""What a run shows while it works: a bar on a terminal, lines elsewhere, or JSON; at the end its warnings."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

Event = Mapping[str, Any]
LINE_EVERY_S = 10.0
SHOWN = 3


class Reporter(Protocol):
    """Receives the events of `runs.execute.Execution`."""

    def __call__(self, event: Event) -> None:
        """Shows one event."""

    def close(self) -> None:
        """Leaves the terminal as it was and tells the warnings."""


@dataclass
class Pace:
    """Speed of one stage, measured from when this process took it up.

    Args:
        unit: ``rounds`` or ``chunks``.
        started: monotonic seconds.
    """

    unit: str
    started: float
    clients: int = 0
    first: int | None = None
    done: int = 0
    total: int = 0

    def advance(self, done: int, total: int) -> None:
        """Notes that ``done`` of ``total`` are committed; those before the first call were done earlier."""
        self.first = done - 1 if self.first is None else self.first
        self.done, self.total = done, total

    def elapsed(self, now: float) -> timedelta:
        """Time since the start, whole seconds."""
        return timedelta(seconds=round(now - self.started))

    def rate(self, now: float) -> str:
        """``12.3 clients/s``."""
        return f"{self.clients / max(now - self.started, 1e-9):.1f} clients/s"

    def eta(self, now: float) -> str:
        """``ETA 0:01:10``, or blank before the first commit."""
        own = self.done - (self.first or 0)
        if not own or self.first is None:
            return "ETA -:--:--"
        left = (self.total - self.done) * (now - self.started) / own
        return f"ETA {timedelta(seconds=round(left))}"


@dataclass
class Notes:
    """Warnings and failures, gathered for the end of the run."""

    warnings: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    """Sentence to where it was seen."""
    failures: list[str] = field(default_factory=list)

    def add(self, event: Event) -> None:
        """Keeps what must be told at the end."""
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
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            console.print(f"  [yellow]•[/] {len(places)} x {escape(text)}: {escape(', '.join(places[:SHOWN]))}{more}")


class JsonLog:
    """One JSON object per line and event."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, event: Event) -> None:
        """Prints the event with the time of day (UTC)."""
        stamped = {"time": datetime.now().astimezone().isoformat(timespec="milliseconds"), **event}
        self._console.file.write(json.dumps(stamped, ensure_ascii=False, default=str) + "\n")
        self._console.file.flush()

    def close(self) -> None:
        """Nothing is kept back."""


class Lines:
    """One line per stage, and one every ten seconds within it, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console, self._notes = console, Notes()
        self._pace: Pace | None = None
        self._said = 0.0

    def __call__(self, event: Event) -> None:
        """Prints what a reader of a log wants to know."""
        self._notes.add(event)
        pace, now = self._pace, time.monotonic()
        if event["kind"] == "stage":
            self._pace = Pace(_unit(event), now) if event["state"] == "running" else None
            if pace is not None and event["state"] == "done":
                self._say(f"{_title(event)}  done in {pace.elapsed(now)}, {pace.rate(now)}")
            elif event["state"] != "done":
                self._say(f"{_title(event)}  {event['state']}")
            self._said = now
        elif event["kind"] == "segment" and pace is not None:
            pace.clients += int(event["clients"])
        elif event["kind"] == "progress" and pace is not None:
            pace.advance(event["done"], event["total"])
            if now - self._said >= LINE_EVERY_S:
                self._said = now
                counted = f"{event['done']}/{event['total']} {pace.unit}"
                self._say(f"{event['stage']}  {counted}  {pace.rate(now)}  {pace.eta(now)}")
        elif event["kind"] not in ("warning", "segment", "progress"):
            self._say(_plain(event))

    def close(self) -> None:
        """Tells the warnings."""
        self._notes.show(self._console)

    def _say(self, text: str) -> None:
        self._console.print(Text(f"{datetime.now():%H:%M:%S}  {text}"), soft_wrap=True)


class Bar:
    """A live bar for the stage under way; finished stages become lines above it."""

    def __init__(self, console: Console) -> None:
        self._console, self._notes = console, Notes()
        self._pace: Pace | None = None
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
        elif event["kind"] in ("segment", "progress"):
            self._advance(event, now)
        elif event["kind"] == "failure":
            where = f"{event['client']}  {event['stage']}, round {event['round']}"
            self._console.print(f"[red]✗[/] {escape(where)}: {escape(str(event['reason']))}")
        elif event["kind"] != "warning":
            self._console.print(Text(f"  {_plain(event)}", style="dim"))

    def close(self) -> None:
        """Removes the bar and tells the warnings."""
        self._bar.stop()
        self._notes.show(self._console)

    def _stage(self, event: Event, now: float) -> None:
        title, pace, state = _title(event), self._pace, event["state"]
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task, self._pace = None, None
        if state == "done" and pace is not None:
            text = f"{pace.elapsed(now)}  {pace.rate(now)}" if pace.done else "nothing was missing"
            self._console.print(f"[green]✓[/] {escape(title)}  [dim]{text}[/]")
        elif state == "reused":
            self._console.print(f"[green]✓[/] {escape(title)}  [dim]already there[/]")
        elif state in ("running", "checking", "preparing"):
            self._pace = Pace(_unit(event), now)
            unit = self._pace.unit if state == "running" else ""
            self._task = self._bar.add_task(escape(title), total=None, unit=unit, rate="", eta="")

    def _advance(self, event: Event, now: float) -> None:
        if self._pace is None or self._task is None:
            return
        if event["kind"] == "segment":
            self._pace.clients += int(event["clients"])
            self._bar.update(self._task, rate=self._pace.rate(now))
        else:
            self._pace.advance(event["done"], event["total"])
            self._bar.update(
                self._task, completed=event["done"], total=event["total"], rate=self._pace.rate(now),
                eta=self._pace.eta(now),
            )  # fmt: skip


def reporter(console: Console, json_log: bool = False) -> Reporter:
    """The fitting reporter: JSON if asked for, a bar on a terminal, lines elsewhere."""
    if json_log:
        return JsonLog(console)
    return Bar(console) if console.is_terminal else Lines(console)


def _unit(event: Event) -> str:
    return "chunks" if str(event["stage"]).startswith("personalise") else "rounds"


def _title(event: Event) -> str:
    number = f"[{event['number']}/{event['of']}] " if "number" in event else ""
    return f"{number}{event['stage']}"


def _plain(event: Event) -> str:
    """Any other event in one line: its text if it has one, else its fields."""
    if "text" in event:
        return str(event["text"])
    rest = "  ".join(f"{key}={value}" for key, value in event.items() if key != "kind")
    return f"{event['kind']}  {rest}"
