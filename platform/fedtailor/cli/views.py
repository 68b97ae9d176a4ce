"""What `judge`, `compare` and `pretrain` show."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
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
from fedtailor.tracking.progress import Throughput, eta_text

LINE_EVERY_S = 30.0
"""Between two lines of a pretraining where there is no terminal."""

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LONGEST = 60


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
