"""What `status`, `judge`, `compare` and `pretrain` show."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedtailor.cli.terminal import plain_table
from fedtailor.report.compare import Comparison, Rows
from fedtailor.report.compare_files import TEXT, by_key, pairs_grid, results_grid
from fedtailor.report.grid import Grid
from fedtailor.report.judge import RESULT_COLUMNS, Judged, format_row
from fedtailor.report.names import in_pool_order, pool_name, shortened
from fedtailor.report.scores import AVERAGE
from fedtailor.report.significance import LEVEL
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.progress import Throughput, eta_text
from fedtailor.tracking.status import EXIT_CODES, State, Status, all_states, status_of

STATES = {
    "complete": "green", "running": "cyan", "interrupted": "yellow", "failed": "red", "dead": "bold red",
    "created": "dim",
}  # fmt: skip

REFRESH_S = 2.0
_PAUSES = 5.0
"""Pause between two looks, at least so many times as long as one look took."""

LINE_EVERY_S = 30.0
"""Between two lines of a pretraining where there is no terminal."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST = 60


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


class PretrainView:
    """Receives the events of `models.pretrain`; ``with PretrainView(console) as show: ...``.

    A bar on a terminal, a line now and then elsewhere.

    Args:
        console: where to show.
        clock: seconds, for the speeds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._throughput = console, clock, Throughput(clock)
        columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
        self._bar = Progress(*columns, console=console, auto_refresh=False, disable=not console.is_terminal)
        self._loss: float | None = None
        self._tokens, self._line_at = 0, 0.0

    def __enter__(self) -> PretrainView:
        """Takes the terminal's last line."""
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the terminal as it was."""
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Shows one event."""
        if event["kind"] == "note":
            self._console.print(escape(event["text"]))
        elif event["kind"] == "start":
            self._throughput.begin("", event["step"])
            self._tokens, self._line_at = event["tokens"], self._clock()
            self._bar.add_task("", total=event["steps"], completed=event["step"])
        elif event["kind"] == "step":
            self._step(event["step"], event["loss"])
        elif event["kind"] == "measure":
            self._console.print(
                f"step {event['step']}: train loss {event['train_loss']:.3f}, held-out loss "
                f"{event['held_out_loss']:.3f}, accuracy {event['held_out_accuracy']:.1%} of masked tokens"
            )

    def _step(self, step: int, loss: float) -> None:
        (task,) = self._bar.tasks
        self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss
        self._throughput.advance(step, steps := int(task.total or 0))
        rate = self._throughput.per_second
        speed = (
            f"loss {self._loss:.3f}  {rate:.2f} steps/s  {rate * self._tokens:,.0f} tokens/s  "
            f"{eta_text(self._throughput.seconds_left)}"
        )
        self._bar.update(task.id, completed=step, description=speed, refresh=True)
        if not self._console.is_terminal and self._clock() - self._line_at >= LINE_EVERY_S:
            self._line_at = self._clock()
            self._console.print(f"step {step}/{steps}  {speed}")


@contextmanager
def bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar in a terminal, nothing elsewhere; gives what `judge` takes as ``tell``."""
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("judging", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show_judged(console: Console, judged: Judged, model: str, scale: int) -> None:
    """The table, what was asked, and where everything is."""
    title = f"Scores of {escape(model)}, 0 to {scale}: mean and SD over clients"
    table = plain_table(*RESULT_COLUMNS, title=title, numbers=("budget", *RESULT_COLUMNS[4:]))
    for row in judged.table.to_dict("records"):
        table.add_row(*map(escape, format_row(row)), end_section=row["language"] == AVERAGE)
    console.print(table)
    counts = judged.counts
    console.print(
        f"[dim]judgements[/] {counts['wanted']}, {counts['there']} of them there before, {counts['missing']} missing"
    )
    console.print(f"[green]written[/]  {escape(judged.place)}", soft_wrap=True)


def show_comparison(console: Console, content: Comparison, out: Path) -> None:
    """Runs, differences, results and paired differences to the first run, then where everything was written."""
    ids, measure = content.run_ids, content.measure
    # Short names; numbers where letters do not suffice.
    letters = list(_LETTERS[: len(ids)]) if len(ids) <= len(_LETTERS) else [str(k + 1) for k in range(len(ids))]
    names = dict(zip(ids, letters, strict=True))
    console.print(_table(by_key("", letters, _cut((("Run", tuple(ids)), *content.facts))), "Runs"))
    if content.changed:
        rows = _cut(tuple((key, _without_common_start(values)) for key, values in content.changed))
        console.print(_table(by_key("Key", letters, rows), "What differs"))
    else:
        console.print("[bold]What differs[/]  no key that can change a number")
    for pool in in_pool_order(content.results["pool"]):
        title = f"{pool_name(pool)}: {measure.phrase} in %, {measure.mean} (SD over seeds)"
        console.print(_table(results_grid(content, pool, names), title))
        pairs = pairs_grid(content, pool, names, brief=True)
        if pairs.rows:
            console.print(_table(pairs, f"{pool_name(pool)}: paired differences in points (corrected p)"))
    if content.pairs:
        rest = f", and differences not from {letters[0]}," if any(p.earlier != ids[0] for p in content.pairs) else ""
        console.print(f"[dim]▲ better, ▼ worse (p < {LEVEL:g}). 95 % intervals{rest} are in {TEXT}.[/]")
    for note in content.notes:
        console.print(f"[yellow]note[/] {escape(note)}")
    for sentence in content.wandb:
        console.print(f"[cyan]W&B[/]  {escape(sentence)}", soft_wrap=True)
    console.print(f"[green]written[/]  {escape(str(out / TEXT))}", soft_wrap=True)


def _table(grid: Grid, title: str) -> Table:
    """A grid in the terminal; between two rules, the first row alone has the name."""
    table = plain_table(*grid.header, title=escape(title), numbers=grid.header[grid.labels :])
    for i, row in enumerate(grid.rows):
        cells = [
            Text(" ").join(
                Text(word, "bold" if (i, j, k) in grid.bold else "") for k, word in enumerate(cell.split(" "))
            )
            for j, cell in enumerate(row)
        ]
        repeated = bool(grid.rules) and i > 0 and i not in grid.rules
        table.add_row("" if repeated else cells[0], *cells[1:], end_section=i + 1 in grid.rules)
    return table


def _cut(rows: Rows) -> Rows:
    return tuple((key, tuple(shortened(value, _LONGEST) for value in values)) for key, values in rows)


def _without_common_start(values: tuple[str, ...]) -> tuple[str, ...]:
    """Lists cut by their common beginning, so that long ones can be told apart; other values as they are.

    >>> _without_common_start(("[amh, eng, yor]", "[amh, eng]")), _without_common_start(("0.001", "0.01"))
    (('[…, yor]', '[…]'), ('0.001', '0.01'))
    """
    lists = [value[1:-1].split(", ") for value in values if value.startswith("[") and value.endswith("]")]
    if len(lists) < len(values):
        return values
    shared = sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))
    return tuple(f"[{', '.join(['…', *items[shared:]])}]" for items in lists) if shared else values
