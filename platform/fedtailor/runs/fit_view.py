"""Memory of a language model as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.runs.console import plain_table
from fedtailor.runs.estimate import Estimate
from fedtailor.runs.experiment import ExperimentBase
from fedtailor.runs.fit import USABLE, Fit

_PARTS = ("base", "adapters", "gradients, Adam", "activations", "logits", "cache of answers", "at most")


def size(count: float) -> str:
    """Bytes for people: ``2.85 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show_fit(console: Console, fit: Fit, stages: Sequence[tuple[str, Estimate]], exp: ExperimentBase) -> None:
    """Every stage on a worker or rank, then the largest with and without ZeRO, and what follows.

    Args:
        console: where to.
        fit: what fits.
        stages: name and estimate.
        exp: whole configuration.
    """
    zero, engine = exp.engine.zero, exp.engine
    whose = "one worker" if zero.ranks == 1 else f"each of {zero.ranks} ranks (ZeRO stage {zero.stage})"
    how = f"base {exp.model.weights}, computed in {engine.dtype}"
    how += f", {engine.micro_batch or 'all'} rows of a lane at a time"
    how += ", checkpointing" if exp.model.checkpointing else ""
    table = plain_table("stage", *_PARTS, title=f"Memory of {whose} (estimate; {how})", numbers=_PARTS)
    for name, needs in stages:
        table.add_row(escape(name), *_cells(needs))
    console.print(table)
    console.print(_options(fit, zero.stage, zero.ranks))
    for sentence in fit.advice:
        console.print(f"[bold cyan]•[/] {escape(sentence)}", highlight=False)
    console.print(
        "[dim]Rows at their longest, every token a response. A stage trains, then answers: the larger of the two "
        "counts. Without Python and its libraries.[/]",
        highlight=False,
    )


def _options(fit: Fit, stage: int, own: int) -> Table:
    room = fit.capacity
    title = f"The largest stage with and without ZeRO: {size(room.bytes)} each ({room.says}), {USABLE:.0%} of it usable"
    table = plain_table("held by", *_PARTS, "fits", title=escape(title), numbers=_PARTS)
    for option in fit.options:
        kind = stage if option.ranks == own else 3
        name = "1 worker" if option.ranks == 1 else f"{option.ranks} ranks, stage {kind}"
        table.add_row(name, *_cells(option.needs), "[green]yes[/]" if option.fits else "[red]no[/]")
    return table


def _cells(needs: Estimate) -> list[str]:
    optimizer = needs.trained - needs.adapters
    parts = (needs.weights, needs.adapters, optimizer, needs.activations, needs.logits, needs.cache, needs.memory)
    return [size(part) if part else "" for part in parts]
