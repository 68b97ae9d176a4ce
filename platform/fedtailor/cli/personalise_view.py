"""What `personalise` shows."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.cli.terminal import plain_table
from fedtailor.personalise.data import Labelled
from fedtailor.personalise.job import MERGED, RECORD, Ready, loading
from fedtailor.personalise.new_client import Result


def show_ready(console: Console, ready: Ready) -> None:
    """What was read and what it becomes, before the model is loaded."""
    generator, request = ready.generator, ready.request
    console.print(
        f"[bold]{escape(generator.run_id)}[/]  generator for r <= {generator.exp.r_max}, seed {generator.seed}, "
        f"L = {len(generator.modules)} layers, {escape(generator.exp.task.name)}",
        highlight=False,
    )
    _line(console, ready.train, ready.tokens.truncated[0], generator.exp.task.max_length)
    if request.test is not None:
        _line(console, ready.test, ready.tokens.truncated[1], generator.exp.task.max_length)
    for note in notes(ready):
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)
    table = plain_table("class", "train", "held out", numbers=("train", "held out"))
    train, test = (data.counts(len(generator.labels)) for data in (ready.train, ready.test))
    for name, a, b in zip(generator.labels, train, test, strict=True):
        if a or b:
            table.add_row(escape(name), str(a), str(b))
    table.add_section()
    table.add_row("all", str(sum(train)), str(sum(test)))
    console.print(table)


def notes(ready: Ready) -> list[str]:
    """What is allowed but worth knowing."""
    train, test = ready.train, ready.test
    sentences = []
    if len(test) > len(train):
        sentences.append(f"more held-out rows ({len(test)}) than training rows ({len(train)})")
    if ready.overlap:
        sentences.append(f"{ready.overlap} of {len(test)} held-out texts are trained on too: their score flatters")
    untrained = sorted(set(test.labels) - set(train.labels))
    if untrained:
        names = ", ".join(ready.generator.labels[i] for i in untrained)
        sentences.append(f"held out but never trained on: {names}")
    return sentences


def show_result(console: Console, ready: Ready, result: Result) -> None:
    """Scores, ranks, where everything is and how to load it."""
    request = ready.request
    console.print(score_table(ready, result))
    console.print(rank_table(result.ranks, request.budget))
    for warning in result.warnings:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False)
    if result.tied == 1:
        console.print(
            "[yellow]note[/] the generator gives every rank the same weight here: this is plain LoRA", highlight=False
        )
    out = request.out.expanduser().resolve()
    merged = f"; the merged model is in {escape(MERGED)}/" if request.merge else ""
    written = f"[green]written[/]  {escape(str(out))} (peft adapter; all numbers in {RECORD}{merged})"
    console.print(written, highlight=False, soft_wrap=True)
    for line in loading(ready.generator, str(out)):
        console.print(f"  [cyan]{escape(line)}[/]", highlight=False, soft_wrap=True)


def score_table(ready: Ready, result: Result) -> Table:
    """Majority class, base and personalised model on the held-out rows."""
    numbers = ("accuracy in %", "correct", "loss")
    table = plain_table("model", *numbers, title="Held-out rows", numbers=numbers)
    label, hits = result.majority
    count = result.base.count
    table.add_row(
        f"majority class ({escape(ready.generator.labels[label])})", f"{100 * hits / count:.2f}", f"{hits}/{count}", ""
    )
    for name, score in (("base model", result.base), ("personalised", result.personalised)):
        accuracy, loss = 100 * score.correct / score.count, score.loss_sum / score.count
        table.add_row(name, f"{accuracy:.2f}", f"{score.correct}/{score.count}", f"{loss:.4f}")
    return table


def rank_table(ranks: Mapping[str, int], budget: int) -> Table:
    """Ranks kept: a row for each transformer layer, a column for each of its parts, then the modules outside."""
    from fedtailor.models.families import in_part_order, locate_module

    places = {module: locate_module(module) for module in ranks}
    parts = in_part_order(part for layer, part in places.values() if layer is not None)
    heads = [part.replace("\n", " ") for part in parts]
    total = sum(ranks.values())
    title = f"Ranks kept: {total} = r L = {budget} x {len(ranks)}"
    table = plain_table("layer", *heads, "sum", title=title, numbers=(*heads, "sum"))
    for number in sorted({layer for layer, _ in places.values() if layer is not None}):
        here = {places[module][1]: rank for module, rank in ranks.items() if places[module][0] == number}
        cells = [str(here[part]) if part in here else "" for part in parts]
        table.add_row(str(number), *cells, str(sum(here.values())))
    for module, (layer, part) in places.items():
        if layer is None:
            table.add_row(escape(part), *[""] * len(parts), str(ranks[module]))
    return table


def _line(console: Console, data: Labelled, truncated: int, max_length: int) -> None:
    columns = data.columns
    texts = f"'{columns.text}'" if columns.pair is None else f"'{columns.text}' and '{columns.pair}'"
    parts = [f"{data.rows} rows, text {texts}, label '{columns.label}'"]
    if data.empty:
        parts.append(f"{data.empty} without text left out")
    if truncated:
        parts.append(f"{truncated} cut to {max_length} tokens")
    console.print(f"[dim]read[/] {escape(data.name)}: {escape('; '.join(parts))}", highlight=False)
