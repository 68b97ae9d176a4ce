"""Status, plan, personalise, compare, judge as tables.

``fedtailor status``: one run, all runs, or one run until it ends.

What ``fedtailor judge`` prints.

What ``fedtailor compare`` prints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fedtailor.cli.terminal import STATES, plain_table, status_table
from fedtailor.report.compare import TEXT
from fedtailor.report.compare_content import Comparison, behind, cell_text, pair_text, pair_title
from fedtailor.report.compare_differences import Row, told_apart
from fedtailor.report.compare_pairs import RunPair
from fedtailor.report.compare_tables import PoolTable
from fedtailor.report.judge import AVERAGE, RESULT_COLUMNS, Judged, shown
from fedtailor.report.metrics import Measure
from fedtailor.report.names import method_name, pool_name, shortened
from fedtailor.report.significance import LEVEL
from fedtailor.report.wording import budget_title
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.status import EXIT_CODES, State, Status, all_states, status_of
from fedtailor.tracking.throughput import eta_text

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
        table.add_row(*map(escape, shown(row)), end_section=row["language"] == AVERAGE)
    console.print(table)
    counts = judged.counts
    console.print(
        f"[dim]judgements[/] {counts['wanted']}, {counts['there']} of them there before, {counts['missing']} missing",
        highlight=False,
    )
    console.print(f"[green]written[/]  {escape(judged.place)}", highlight=False, soft_wrap=True)


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_LONGEST = 60

_SUM = "clients × seeds"


def show_comparison(console: Console, content: Comparison, out: Path) -> None:
    """Runs, differences, results and paired differences to the first run, then where everything was written."""
    letters = letters_of(content.run_ids)
    console.print(_transposed("", letters, [("Run", content.run_ids), *content.facts], "Runs"))
    if content.changed.rows:
        console.print(_transposed("key", letters, [told_apart(row) for row in content.changed.rows], "What differs"))
    else:
        console.print("[bold]What differs[/]  no key that can change a number", highlight=False)
    for table in content.tables:
        console.print(_results(letters, table, content.measure))
        if content.grid(table.pool):
            console.print(_pairs(content, letters, table))
    if content.pairs:
        rest = f", and differences not from {letters[0]}," if any(pair.other for pair in content.pairs) else ""
        console.print(
            f"[dim]▲ better, ▼ worse (p < {LEVEL:g}). 95 % intervals{rest} are in {TEXT}.[/]", highlight=False
        )
    for note in content.notes:
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)
    for sentence in content.wandb:
        console.print(f"[cyan]W&B[/]  {escape(sentence)}", highlight=False, soft_wrap=True)
    console.print(f"[green]written[/]  {escape(str(out / TEXT))}", highlight=False, soft_wrap=True)


def letters_of(run_ids: Sequence[str]) -> list[str]:
    """Short names for tables: A, B, ...; numbers where letters do not suffice."""
    if len(run_ids) <= len(_LETTERS):
        return list(_LETTERS[: len(run_ids)])
    return [str(number + 1) for number in range(len(run_ids))]


def _transposed(name: str, letters: Sequence[str], rows: Sequence[Row], title: str) -> Table:
    table = plain_table(name, *letters, title=title)
    for key, values in rows:
        table.add_row(escape(key), *(escape(shortened(value, _LONGEST)) for value in values))
    return table


def _results(letters: Sequence[str], table: PoolTable, measure: Measure) -> Table:
    heads = [budget_title(budget) for budget in table.budgets]
    title = f"{escape(pool_name(table.pool))}: {measure.phrase} in %, {measure.mean} (SD over seeds)"
    shown = plain_table("run", "method", *heads, _SUM, title=title, numbers=(*heads, _SUM))
    for number, line in enumerate(table.lines):
        cells = []
        for budget in table.budgets:
            mean, sd = cell_text(cell := line.cells.get(budget))
            cells.append(f"{f'[bold]{mean}[/]' if cell is not None and cell.best else mean} {sd}".strip())
        first = number == 0 or table.lines[number - 1].run != line.run
        last = number + 1 == len(table.lines) or table.lines[number + 1].run != line.run
        name = letters[line.run] if first else ""
        shown.add_row(name, escape(method_name(line.method)), *cells, behind(line), end_section=last)
    return shown


def _pairs(content: Comparison, letters: Sequence[str], table: PoolTable) -> Table:
    """The pairs with the first run, which is the reference; with none of it, all of them."""
    rows = content.grid(table.pool)
    rows = {key: at for key, at in rows.items() if key[1] == 0} or rows
    heads = [budget_title(budget) for budget in table.budgets]
    title = f"{escape(pool_name(table.pool))}: paired differences in points (corrected p)"
    shown = plain_table("runs", "method", *heads, title=title, numbers=heads)
    for key, at in rows.items():
        runs, method = pair_title(key, letters)
        shown.add_row(runs, escape(method), *(_short(at.get(budget)) for budget in table.budgets))
    return shown


def _short(pair: RunPair | None) -> str:
    """``+3.28▲ (<0.001)``: without the interval, so that four budgets fit into 100 columns."""
    told, _, p = pair_text(pair)
    return escape(f"{told.replace(' ▲', '▲').replace(' ▼', '▼')} {p and f'({p[2:]})'}".strip())
