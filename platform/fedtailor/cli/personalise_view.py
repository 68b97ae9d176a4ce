"""What `personalise` shows; all numbers are those of its record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.cli.terminal import plain_table
from fedtailor.models.families import in_part_order, locate_module
from fedtailor.personalise.export import RECORD, loading
from fedtailor.personalise.new_client import MERGED, Ready


def show_ready(console: Console, ready: Ready) -> None:
    """What was read and what it becomes, before the model is loaded."""
    record, exp = ready.record, ready.generator.exp
    train, test = record["data"], record["test"]
    console.print(
        f"[bold]{escape(record['run'])}[/]  generator for r <= {exp.r_max}, seed {record['seed']}, "
        f"L = {record['base']['layers']} layers, {escape(exp.task.name)}",
        highlight=False,
    )
    for part in (train,) if ready.request.test is None else (train, test):
        console.print(f"[dim]read[/] {escape(_rows(part, record['max_length']))}", highlight=False)
    for note in notes(train, test):
        console.print(f"[yellow]note[/] {escape(note)}", highlight=False)
    table = plain_table("class", "train", "held out", numbers=("train", "held out"))
    for name in record["base"]["labels"]:
        counts = [part["classes"][name] for part in (train, test)]
        if any(counts):
            table.add_row(escape(name), *map(str, counts))
    table.add_section()
    table.add_row("all", str(train["used"]), str(test["used"]))
    console.print(table)


def notes(train: Mapping[str, Any], test: Mapping[str, Any]) -> list[str]:
    """What is allowed but worth knowing of the rows to learn from and to score on."""
    sentences = []
    if test["used"] > train["used"]:
        sentences.append(f"more held-out rows ({test['used']}) than training rows ({train['used']})")
    if shared := test["also_in_data"]:
        sentences.append(f"{shared} of {test['used']} held-out texts are trained on too: their score flatters")
    if untrained := [name for name, count in test["classes"].items() if count and not train["classes"][name]]:
        sentences.append(f"held out but never trained on: {', '.join(untrained)}")
    return sentences


def show_result(console: Console, ready: Ready, record: Mapping[str, Any]) -> None:
    """Scores, ranks, where everything is and how to load it."""
    console.print(score_table(record["scores"]))
    console.print(rank_table(record["ranks"], record["budget"]))
    for warning in record["warnings"]:
        console.print(f"[yellow]warning[/] {escape(warning)}", highlight=False)
    if record["tied_at_threshold"] == 1:
        console.print(
            "[yellow]note[/] the generator gives every rank the same weight here: this is plain LoRA", highlight=False
        )
    out = ready.request.out.expanduser().resolve()
    merged = f"; the merged model is in {escape(MERGED)}/" if ready.request.merge else ""
    written = f"[green]written[/]  {escape(str(out))} (peft adapter; all numbers in {RECORD}{merged})"
    console.print(written, highlight=False, soft_wrap=True)
    for line in loading(ready.generator.base, str(out)):
        console.print(f"  [cyan]{escape(line)}[/]", highlight=False, soft_wrap=True)


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Majority class, base and personalised model on the held-out rows."""
    numbers = ("accuracy in %", "correct", "loss")
    table = plain_table("model", *numbers, title="Held-out rows", numbers=numbers)
    names = {"majority": f"majority class ({scores['majority']['class']})", "base": "base model"}
    for name, score in scores.items():
        loss = f"{score['loss']:.4f}" if "loss" in score else ""
        hits = f"{score['correct']}/{score['count']}"
        table.add_row(escape(names.get(name, name)), f"{100 * score['accuracy']:.2f}", hits, loss)
    return table


def rank_table(ranks: Mapping[str, int], budget: int) -> Table:
    """Ranks kept: a row for each transformer layer, a column for each of its parts, then the modules outside."""
    places = [(*locate_module(module), rank) for module, rank in ranks.items()]
    parts = in_part_order(part for layer, part, _ in places if layer is not None)
    heads = [part.replace("\n", " ") for part in parts]
    title = f"Ranks kept: {sum(ranks.values())} = r L = {budget} x {len(ranks)}"
    table = plain_table("layer", *heads, "sum", title=title, numbers=(*heads, "sum"))
    for number in sorted({layer for layer, _, _ in places if layer is not None}):
        here = {part: rank for layer, part, rank in places if layer == number}
        table.add_row(str(number), *(str(here.get(part, "")) for part in parts), str(sum(here.values())))
    for layer, part, rank in places:
        if layer is None:
            table.add_row(escape(part), *[""] * len(parts), str(rank))
    return table


def _rows(part: Mapping[str, Any], max_length: int) -> str:
    """What was read of a table."""
    text, pair, label = (part["columns"][name] for name in ("text", "pair", "label"))
    texts = f"'{text}'" if pair is None else f"'{text}' and '{pair}'"
    found = [f"{part['rows']} rows, text {texts}, label '{label}'"]
    if part["empty"]:
        found.append(f"{part['empty']} without text left out")
    if part["truncated"]:
        found.append(f"{part['truncated']} cut to {max_length} tokens")
    return f"{part['name']}: {'; '.join(found)}"
