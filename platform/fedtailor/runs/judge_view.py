"""What ``fedtailor judge`` prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedtailor.runs.console import plain_table
from fedtailor.runs.judge import Judged
from fedtailor.runs.judge_table import AVERAGE, RESULT_COLUMNS, shown


@contextmanager
def bar(console: Console) -> Iterator[Callable[[int, int], None]]:
    """A bar in a terminal, nothing elsewhere; gives what `judge` takes as ``tell``."""
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("judging", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def show(console: Console, judged: Judged, model: str, scale: int) -> None:
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
