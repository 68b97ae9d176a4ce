"""What a run shows while it works: a bar on a terminal, lines elsewhere, or JSON; at the end its warnings.

`Throughput` measures the stage under way; ``progress.json`` shows it to other processes.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.text import Text

from fedtailor.core.errors import listed
from fedtailor.storage.journal import stamp, utc_now
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.events import Event, describe, name_of

LINE_EVERY_S = 10.0
FILE_EVERY_S = 2.0
"""Shortest time between two writings of ``progress.json``."""

SHOWN = 3


class Throughput:
    """Speed of one stage, measured from when this process took it up.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.begin("")

    def begin(self, stage: str, first: int | None = None) -> None:
        """Measures another stage from now on, of which ``first`` are done, if that is known."""
        self.stage, self.unit = stage, "chunks" if stage.startswith("personalise") else "rounds"
        self.started, self._first = self._clock(), first
        self.clients = self.done = self.total = 0
        self.retries = 0
        """Segments that were lost and went out again."""

    def take(self, event: Event) -> None:
        """Counts what an event adds; a stage that begins to run is measured from now on."""
        match name_of(event):
            case "stage" if event["state"] == "running":
                self.begin(event["stage"])
            case "segment":
                self.clients += int(event["clients"])
            case "progress":
                self.advance(event["done"], event["total"])
            case "pool/job_retried":
                self.retries += 1

    def advance(self, done: int, total: int) -> None:
        """Notes that ``done`` of ``total`` are there; those before the first call were done earlier."""
        self._first = done - 1 if self._first is None else self._first
        self.done, self.total = done, total

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start, never 0."""
        return max(self._clock() - self.started, 1e-9)

    @property
    def per_second(self) -> float:
        """Rounds, chunks or steps per second; 0 before the first."""
        return (self.done - (self._first or 0)) / self.elapsed_s

    @property
    def clients_per_second(self) -> float:
        """Clients per second."""
        return self.clients / self.elapsed_s

    @property
    def seconds_left(self) -> float | None:
        """Expected seconds to the stage's end; None before the first commit."""
        return (self.total - self.done) / self.per_second if self.per_second else None

    @property
    def rate(self) -> str:
        """``12.3 clients/s``, and how many segments were retried if any was."""
        again = {0: "", 1: ", 1 retry"}.get(self.retries, f", {self.retries} retries")
        return f"{self.clients_per_second:.1f} clients/s{again}"

    @property
    def elapsed(self) -> str:
        """``0:01:10``."""
        return str(timedelta(seconds=round(self.elapsed_s)))


def eta_text(seconds: float | None) -> str:
    """``ETA 0:01:10``; without digits where unknown."""
    return "ETA -:--:--" if seconds is None else f"ETA {timedelta(seconds=round(seconds))}"


class ProgressFile:
    """Keeps ``progress.json`` in step with a run's events, at most every `FILE_EVERY_S` seconds.

    Args:
        run: its folder.
    """

    def __init__(self, run: RunFolder) -> None:
        self._run, self._throughput, self._written = run, Throughput(), 0.0

    def __call__(self, event: Event) -> None:
        """Takes any event."""
        self._throughput.take(event)
        kind, now = event["kind"], time.monotonic()
        due = kind in ("segment", "progress") and now - self._written >= FILE_EVERY_S
        if due or (kind == "stage" and event["state"] == "running"):
            self._written, t, left = now, self._throughput, self._throughput.seconds_left
            self._run.set_progress(
                {
                    "stage": t.stage, "unit": t.unit, "done": t.done, "total": t.total, "clients": t.clients,
                    "elapsed_s": round(t.elapsed_s, 3), "clients_per_second": round(t.clients_per_second, 3),
                    "seconds_left": None if left is None else round(left, 1), "updated": utc_now(),
                }
            )  # fmt: skip


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


class Display:
    """A live bar on a terminal, finished stages as lines above it; in logs and pipes a line per stage and one every ten
    seconds within it. At the end the warnings.

    Args:
        console: where to show.
    """

    def __init__(self, console: Console) -> None:
        self._console, self._throughput, self._line_at = console, Throughput(), 0.0
        self._failures: list[str] = []
        self._warnings: dict[str, list[str]] = defaultdict(list)  # sentence to where it was seen
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}  [cyan]{task.fields[rate]}[/]  {task.fields[eta]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar.start()

    def __call__(self, event: Event) -> None:
        """Shows what matters of an event; keeps warnings and failures for the end."""
        self._throughput.take(event)
        kind = event["kind"]
        if kind == "stage":
            self._stage(event)
        elif kind in ("segment", "progress"):
            self._advance()
        elif kind == "warning":
            what = event["what"] if isinstance(event["what"], Mapping) else {"reason": event["what"]}
            who = str(what.get("client") or ", ".join(what.get("clients", ())))
            place = f"{who} ({event['stage']}, round {event['round']})".strip()
            self._warnings[str(what.get("reason", what))].append(place)
        elif kind == "failure":
            self._failures.append(f"{event['client']} ({event['stage']}, round {event['round']}): {event['reason']}")
            self._say(describe(event), "[red]✗[/]")
        else:
            self._say(describe(event))

    def close(self) -> None:
        """Removes the bar; shows how many failures and warnings there were, and the first of them."""
        self._bar.stop()
        if self._failures:
            self._console.print(f"[bold red]{len(self._failures)} client failures[/], all in failures.jsonl:")
            for line in self._failures[:SHOWN]:
                self._console.print(f"  [red]•[/] {escape(line)}")
        if self._warnings:
            total, kinds = sum(map(len, self._warnings.values())), len(self._warnings)
            self._console.print(f"[yellow]{total} warnings[/] of {kinds} kinds, all in events.jsonl:")
        for text, places in sorted(self._warnings.items(), key=lambda item: -len(item[1]))[:SHOWN]:
            self._console.print(f"  [yellow]•[/] {len(places)} x {escape(text)}: {escape(listed(places, SHOWN))}")

    def _stage(self, event: Event) -> None:
        self._line_at = time.monotonic()
        for task in self._bar.task_ids:
            self._bar.remove_task(task)
        t, state = self._throughput, event["state"]
        title = f"[{event['number']}/{event['of']}] {event['stage']}" if "number" in event else event["stage"]
        if state == "done":
            self._say(
                f"{title}  {f'done in {t.elapsed}, {t.rate}' if t.done else 'nothing was missing'}", "[green]✓[/]"
            )
        elif state == "reused":
            self._say(f"{title}  already there", "[green]✓[/]")
        else:
            unit = t.unit if state == "running" else ""
            self._bar.add_task(escape(title), total=None, unit=unit, rate="", eta="")
            if not self._console.is_terminal:
                self._say(f"{title}  {state}")

    def _advance(self) -> None:
        t, now = self._throughput, time.monotonic()
        eta = eta_text(t.seconds_left) if t.done else ""
        for task in self._bar.task_ids:
            self._bar.update(task, completed=t.done, total=t.total or None, rate=t.rate, eta=eta)
        if t.done and now - self._line_at >= LINE_EVERY_S and not self._console.is_terminal:
            self._line_at = now
            self._say(f"{t.stage}  {t.done}/{t.total} {t.unit}  {t.rate}  {eta}")

    def _say(self, text: str, mark: str = "") -> None:
        """A line above the bar, after a mark; in a log after the time."""
        if self._console.is_terminal:
            self._console.print(Text.from_markup(f"{mark} ") + Text(text) if mark else Text(f"  {text}", "dim"))
        else:
            self._console.print(Text(f"{datetime.now():%H:%M:%S}  {text}"), soft_wrap=True)


Reporter = JsonLog | Display
"""Takes the events of `experiment.execute.Execution` and is closed at the end."""


def reporter(console: Console, json_log: bool = False, run_id: str = "") -> Reporter:
    """The fitting reporter: JSON if asked for, a bar on a terminal, lines elsewhere."""
    return JsonLog(console, run_id) if json_log else Display(console)
