"""What `personalise` shows: the rows it read, then what the client got, as its record says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fedtailor.cli.terminal import plain_table
from fedtailor.models.families import in_part_order, locate_module
from fedtailor.report.names import method_name, shortened

if TYPE_CHECKING:
    from fedtailor.personalise.new_client import Answer, Ready

EXAMPLES, EXCERPT = 3, 160
"""Answers that are shown, and most characters of each of their texts."""

_MEASURES = {
    "accuracy": "accuracy in %",
    "correct": "correct",
    "rougeL": "ROUGE-L in %",
    "meteor": "METEOR in %",
    "loss": "loss",
}
"""Keys of a score to columns; those that a task has are shown."""

_CUTS = {
    "truncated": "cut",
    "cut_prompts": "prompts cut",
    "cut_responses": "responses cut",
    "dropped": "left out as over",
}


def show_ready(console: Console, ready: Ready) -> None:
    """What was read and what it becomes, before the model is loaded."""
    record, exp = ready.record, ready.trained.exp
    train, test = record["data"], record["test"]
    console.print(
        f"[bold]{escape(record['run'])}[/]  {method_name(record['method'])} at r = {record['budget']}, seed "
        f"{record['seed']}, {escape(exp.task.name)}"
    )
    for part in (train,) if ready.request.test is None else (train, test):
        console.print(f"[dim]read[/] {escape(_rows_read(part, record['max_length']))}")
    for note in notes(train, test):
        console.print(f"[yellow]note[/] {escape(note)}")
    if "classes" not in train:
        console.print(f"{train['used']} instructions to learn from, {test['used']} held out")
        return
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
    classes = test.get("classes", {})
    if untrained := [name for name, count in classes.items() if count and not train["classes"][name]]:
        sentences.append(f"held out but never trained on: {', '.join(untrained)}")
    return sentences


def show_result(console: Console, ready: Ready, record: Mapping[str, Any], answers: Sequence[Answer]) -> None:
    """Scores, answers, ranks, where everything is and how to load it."""
    from fedtailor.personalise.export import RECORD, loading
    from fedtailor.personalise.new_client import MERGED

    console.print(score_table(record["scores"]))
    for answer in answers[:EXAMPLES]:
        _show_answer(console, answer)
    if len(set(record["ranks"].values())) == 1:
        console.print(f"[bold]{_ranks_kept(record['ranks'], record['budget'])}[/], the same in every layer")
    else:
        console.print(rank_table(record["ranks"], record["budget"]))
    for warning in record["warnings"]:
        console.print(f"[yellow]warning[/] {escape(warning)}")
    if record.get("tied_at_threshold") == 1:
        console.print("[yellow]note[/] every rank has the same weight here: this is plain LoRA")
    out = ready.request.out.expanduser().resolve()
    merged = f"; the merged model is in {escape(MERGED)}/" if ready.request.merge else ""
    written = f"[green]written[/]  {escape(str(out))} (peft adapter; all numbers in {RECORD}{merged})"
    console.print(written, soft_wrap=True)
    for line in loading(ready.trained.base, str(out), ready.trained.exp.task_entry.kind):
        console.print(f"  [cyan]{escape(line)}[/]", soft_wrap=True)


def _show_answer(console: Console, answer: Answer) -> None:
    table = Table.grid(padding=(0, 2))
    texts = {
        "asked": answer.prompt, "wanted": answer.reference, "base model": answer.base,
        "personalised": answer.personalised,
    }  # fmt: skip
    for name, text in texts.items():
        style = {"personalised": "bold", "asked": "dim"}.get(name, "")
        table.add_row(f"[dim]{name}[/]", Text(shortened(" ".join(text.split()), EXCERPT), style))
    console.print(table)
    console.print()


def score_table(scores: Mapping[str, Mapping[str, Any]]) -> Table:
    """Majority class (of texts), base and personalised model on the held-out rows."""
    columns = {key: name for key, name in _MEASURES.items() if any(key in score for score in scores.values())}
    [count] = {score["count"] for score in scores.values()}
    table = plain_table("model", *columns.values(), title=f"{count} held-out rows", numbers=tuple(columns.values()))
    for name, score in scores.items():
        shown = f"majority class ({score['class']})" if "class" in score else {"base": "base model"}.get(name, name)
        table.add_row(escape(shown), *(_cell(key, score) for key in columns))
    return table


def _cell(key: str, score: Mapping[str, Any]) -> str:
    if key not in score:
        return ""
    if key == "correct":
        return f"{score['correct']}/{score['count']}"
    return f"{score[key]:.4f}" if key == "loss" else f"{100 * score[key]:.2f}"


def rank_table(ranks: Mapping[str, int], budget: int) -> Table:
    """Ranks kept: a row for each transformer layer, a column for each of its parts, then the modules outside."""
    places = [(*locate_module(module), rank) for module, rank in ranks.items()]
    parts = in_part_order(part for layer, part, _ in places if layer is not None)
    heads = [part.replace("\n", " ") for part in parts]
    table = plain_table("layer", *heads, "sum", title=_ranks_kept(ranks, budget), numbers=(*heads, "sum"))
    for number in sorted({layer for layer, _, _ in places if layer is not None}):
        here = {part: rank for layer, part, rank in places if layer == number}
        table.add_row(str(number), *(str(here.get(part, "")) for part in parts), str(sum(here.values())))
    for layer, part, rank in places:
        if layer is None:
            table.add_row(escape(part), *[""] * len(parts), str(rank))
    return table


def _ranks_kept(ranks: Mapping[str, int], budget: int) -> str:
    kept, layers = sum(ranks.values()), len(ranks)
    return f"Ranks kept: {kept}" + (f" = r L = {budget} x {layers}" if kept == budget * layers else "")


def _rows_read(part: Mapping[str, Any], max_length: int) -> str:
    """What was read of a table."""
    found = [f"{part['rows']} rows"]
    if "columns" in part:
        text, pair, label = (part["columns"][name] for name in ("text", "pair", "label"))
        texts = f"'{text}'" if pair is None else f"'{text}' and '{pair}'"
        found = [f"{part['rows']} rows, text {texts}, label '{label}'"]
    if part["empty"]:
        found.append(f"{part['empty']} without {'text' if 'columns' in part else 'instruction or response'} left out")
    found += [
        f"{part[key]} {what} {'' if key == 'dropped' else 'to '}{max_length} tokens"
        for key, what in _CUTS.items()
        if part.get(key)
    ]
    return f"{part['name']}: {'; '.join(found)}"
