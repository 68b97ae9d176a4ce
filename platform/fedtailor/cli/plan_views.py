"""What `plan` and `personalise` show: what a run would do; what a client of one's own got, as its record says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import isnan, nan
from statistics import median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.cli.data_view import show_data
from fedtailor.cli.terminal import plain_table, show_privacy
from fedtailor.experiment.estimate import USABLE, Estimate
from fedtailor.experiment.plan import Plan, StagePlan, seconds_per_client
from fedtailor.experiment.privacy import masked_traffic
from fedtailor.models.families import in_part_order, locate_module
from fedtailor.models.source import model_title
from fedtailor.report.names import method_name
from fedtailor.report.unknown_tokens import unknown_counts, unknown_sentence

if TYPE_CHECKING:
    from fedtailor.personalise.new_client import Ready

_PARTS = {
    "base": "base", "trained": "trained", "gradients,\nAdam": "optimizer", "activations": "activations",
    "logits": "logits", "cache of\nanswers": "cache", "at most": "memory",
}  # fmt: skip
"""Columns of memory, and what they are in an `Estimate`."""

_THERE = {True: "[green]yes[/]", False: "no", None: "[dim]?[/]"}


def size(count: float) -> str:
    """Bytes for people: ``2.85 MB`` (powers of ten)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float) -> str:
    """``4 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_plan(console: Console, plan: Plan) -> None:
    """Prints the whole plan."""
    # One stage of each name; a base that seeds share has its own seed.
    stages = list({_name(row): row for row in reversed(plan.stages)}.values())[::-1]
    _show_header(console, plan)
    if plan.data and "columns" in plan.data:
        show_data(console, str(plan.exp.task.path), plan.data)
    _show_trained(console, plan)
    _show_stages(console, plan, stages)
    _show_memory(console, plan, stages)
    _show_work(console, plan, stages)
    for note in plan.notes:
        console.print(f"[yellow]•[/] {escape(note)}")


def _show_header(console: Console, plan: Plan) -> None:
    exp, people, model = plan.exp, plan.population, plan.model
    texts, groups = "sizes unknown", f"{len(exp.task.languages)} languages; "
    if plan.data and "columns" in plan.data:
        groups = f"{len(plan.data['languages'])} groups; " if "group" in plan.data["columns"] else ""
    if people.train:
        trains = (*people.train, *people.train_unseen)
        texts = f"{int(median(trains))} training texts in the middle ({min(trains)} to {max(trains)})"
    rows = {
        "task": f"{exp.task.name}: {people.seen} seen and {people.unseen} unseen clients, {groups}{texts}",
        "model": f"{model_title(exp.model)}: {model.parameters:,} parameters, L = {model.layers} adapted linear layers",
        "budgets": f"r = {', '.join(map(str, exp.budgets))} (r L = "
        f"{', '.join(str(r * model.layers) for r in exp.budgets)} ranks); r_max = {exp.r_max}",
        "seeds": ", ".join(map(str, exp.seeds)),
        **({} if exp.attack.name == "none" else {"attack": str(exp.attack)}),
        **({"unknown": unknown_sentence(unknown_counts({"": plan.unknown}))} if plan.unknown else {}),
    }
    for name, value in rows.items():
        console.print(f"[bold]{name:<8}[/] {escape(value)}")
    show_privacy(console, exp, 6, people.seen)


def _show_trained(console: Console, plan: Plan) -> None:
    table = plain_table(
        "method", "SHARED", "PRIVATE", "EPHEMERAL", "generator",
        title="Numbers that methods declare, per client", numbers=("SHARED", "PRIVATE", "EPHEMERAL"),
    )  # fmt: skip
    for name, sizes in plan.sizes.items():
        generators = [f"{'-'.join(map(str, g.widths))} with {g.parameters:,} parameters" for g in sizes.generators]
        counts = [f"{n:,}" if n else "" for n in (sizes.shared, sizes.private, sizes.ephemeral)]
        table.add_row(method_name(name), *counts, ", ".join(generators))
    console.print(table)


def _show_stages(console: Console, plan: Plan, stages: Sequence[StagePlan]) -> None:
    right = ("rounds", "cohort", "down/\nround", "up/\nround")
    table = plain_table("stage", *right, "artifact", "there", title="Stages", numbers=right)
    for row in plan.stages:
        stage, cost = row.stage, row.estimate
        name = stage.key if len(plan.exp.seeds) > 1 else _name(row)
        counts = ("", f"all {cost.updates}") if stage.kind == "personalise" else (str(stage.rounds), str(stage.cohort))
        wire = size(cost.wire) if cost.wire else ""
        artifact = stage.artifact.rpartition("-")[2][:8] if row.there is not None else "[dim]?[/]"
        table.add_row(escape(name), *counts, wire, wire, artifact, _THERE[row.there])
    console.print(table)
    for row in stages:
        shared = plan.sizes[row.stage.method].shared
        masked = masked_traffic(plan.exp, plan.population.seen, row.stage.kind, shared) if row.stage.rounds else None
        if masked is not None:
            console.print(
                f"[dim]{escape(_name(row))}: under masks a client sends {size(masked.up)} a round instead of "
                f"{size(4 * shared)}, and receives {size(masked.down)} of keys and shares[/]"
            )
    if any(row.there is None for row in plan.stages):
        console.print("[dim]? unknown without weights: names and what is already there follow from their hash[/]")


def _show_memory(console: Console, plan: Plan, stages: Sequence[StagePlan]) -> None:
    """Every stage on a worker or rank; the largest with and without ZeRO if one worker is not enough; what follows."""
    exp, engine, fit = plan.exp, plan.exp.engine, plan.fit
    columns = [name for name, part in _PARTS.items() if any(getattr(row.estimate, part) for row in stages)]

    def cells(needs: Estimate) -> list[str]:
        return [size(count) if (count := getattr(needs, _PARTS[name])) else "" for name in columns]

    zero = engine.zero
    whose = "one worker" if zero.ranks == 1 else f"each of {zero.ranks} ranks (ZeRO stage {zero.stage})"
    how = (
        f"base {exp.model.weights}, computed in {engine.dtype}, {engine.micro_batch or 'all'} rows of a lane at a time"
    )
    how += ", checkpointing" if exp.model.checkpointing else ""
    table = plain_table("stage", *columns, title=f"Memory of {whose} (estimate; {how})", numbers=columns)
    for row in stages:
        table.add_row(escape(_name(row)), *cells(row.estimate))
    console.print(table)
    source = f"({fit.source}), {USABLE:.0%} of it usable"
    if zero.ranks > 1 or not fit.fits[1]:
        title = f"The largest stage with and without ZeRO: {size(fit.capacity)} each {source}"
        table = plain_table("held by", *columns, "fits", title=escape(title), numbers=columns)
        for ranks, needs in fit.options.items():
            stage = zero.stage if ranks == zero.ranks else 3
            holder = "1 worker" if ranks == 1 else f"{ranks} ranks, stage {stage}"
            table.add_row(holder, *cells(needs), "[green]yes[/]" if fit.fits[ranks] else "[red]no[/]")
        console.print(table)
    else:
        console.print(f"[dim]A worker has {size(fit.capacity)} {escape(source)}.[/]")
    for sentence in fit.advice:
        console.print(f"[bold cyan]•[/] {escape(sentence)}")
    console.print(
        "[dim]Rows at their longest, every token a response. A stage trains, then answers: the larger of the two "
        "counts. Without Python and its libraries.[/]"
    )


def _show_work(console: Console, plan: Plan, stages: Sequence[StagePlan]) -> None:
    known, seeds, workers = seconds_per_client(plan.exp), len(plan.exp.seeds), plan.exp.engine.actors or 1
    numbers = ("client\nupdates", "training\nsteps", "training\ntokens at most", "FLOP at\nmost", "time on\none worker")
    title = f"Work, {f'all {seeds} seeds' if seeds > 1 else 'one seed'}"
    table = plain_table("stage", *numbers, title=title, numbers=numbers)
    times, sums, total = Counter(map(_name, plan.stages)), [0.0] * 4, 0.0
    for row in stages:
        cost, n = row.estimate, times[_name(row)]
        each = known.get((row.stage.kind, row.stage.method), nan)  # nan: not known, and neither is the sum
        counts = [count * n for count in (cost.updates, cost.steps or 0, cost.tokens or 0.0, cost.flops or 0.0)]
        sums = [before + count for before, count in zip(sums, counts, strict=True)]
        total += each * cost.updates * n
        table.add_row(escape(_name(row)), *_work_cells(counts, each * cost.updates * n))
    table.add_section()
    table.add_row("[bold]sum[/]", *_work_cells(sums, total))
    console.print(table)
    if not known:
        console.print("[dim]No earlier run of this task and model in the storage: no time can be given.[/]")
    elif workers > 1:
        console.print(f"[dim]{workers} workers need about 1/{workers} of the time.[/]")


def _work_cells(counts: Sequence[float], seconds: float) -> tuple[str, ...]:
    updates, steps, tokens, flops = counts
    return (
        f"{updates:,.0f}", f"{steps:,.0f}" if steps else "", f"{tokens:,.0f}" if tokens else "",
        f"{flops:.1e}" if flops else "", "" if isnan(seconds) else duration(seconds),
    )  # fmt: skip


def _name(row: StagePlan) -> str:
    return row.stage.key.rsplit("/", 1)[0]


def show_ready(console: Console, ready: Ready) -> None:
    """What was read and what it becomes, before the model is loaded."""
    record, exp = ready.record, ready.generator.exp
    train, test = record["data"], record["test"]
    console.print(
        f"[bold]{escape(record['run'])}[/]  generator for r <= {exp.r_max}, seed {record['seed']}, "
        f"L = {record['base']['layers']} layers, {escape(exp.task.name)}"
    )
    for part in (train,) if ready.request.test is None else (train, test):
        console.print(f"[dim]read[/] {escape(_rows_read(part, record['max_length']))}")
    for note in notes(train, test):
        console.print(f"[yellow]note[/] {escape(note)}")
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
    from fedtailor.personalise.export import RECORD, loading
    from fedtailor.personalise.new_client import MERGED

    console.print(score_table(record["scores"]))
    console.print(rank_table(record["ranks"], record["budget"]))
    for warning in record["warnings"]:
        console.print(f"[yellow]warning[/] {escape(warning)}")
    if record["tied_at_threshold"] == 1:
        console.print("[yellow]note[/] the generator gives every rank the same weight here: this is plain LoRA")
    out = ready.request.out.expanduser().resolve()
    merged = f"; the merged model is in {escape(MERGED)}/" if ready.request.merge else ""
    written = f"[green]written[/]  {escape(str(out))} (peft adapter; all numbers in {RECORD}{merged})"
    console.print(written, soft_wrap=True)
    for line in loading(ready.generator.base, str(out)):
        console.print(f"  [cyan]{escape(line)}[/]", soft_wrap=True)


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


def _rows_read(part: Mapping[str, Any], max_length: int) -> str:
    """What was read of a table."""
    text, pair, label = (part["columns"][name] for name in ("text", "pair", "label"))
    texts = f"'{text}'" if pair is None else f"'{text}' and '{pair}'"
    found = [f"{part['rows']} rows, text {texts}, label '{label}'"]
    if part["empty"]:
        found.append(f"{part['empty']} without text left out")
    if part["truncated"]:
        found.append(f"{part['truncated']} cut to {max_length} tokens")
    return f"{part['name']}: {'; '.join(found)}"
