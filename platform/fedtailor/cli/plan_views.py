"""What `plan` shows: what a run would do, and what was found in a user's own data.

Of data: columns, clients, labels, repeated texts, and rows that were left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import isnan, nan
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from fedtailor.cli.terminal import plain_table, show_privacy
from fedtailor.core.errors import listed
from fedtailor.experiment.estimate import Estimate
from fedtailor.experiment.plan import Plan, StagePlan, seconds_per_client
from fedtailor.experiment.privacy import masked_traffic
from fedtailor.models.source import model_title
from fedtailor.report.names import method_name, plural
from fedtailor.report.unknown_tokens import unknown_counts, unknown_sentence
from fedtailor.tasks.source import POOLS, look_alikes
from fedtailor.tasks.tables import data_files, is_saved

_PARTS = {
    "base": "base", "trained": "trained", "gradients,\nAdam": "optimizer", "activations": "activations",
    "logits": "logits", "cache of\nanswers": "cache", "at most": "memory",
}  # fmt: skip
"""Columns of memory, and what they are in an `Estimate`."""

MOST_LABELS: Final = 20
"""Rows of the table of labels."""

_DROPPED: Final = {
    "dropped_empty_texts": "without a text",
    "dropped_empty_responses": "without a response",
    "dropped_empty_instructions": "without an instruction",
    "dropped_validation_rows": "of validation, as there are rows of test",
}
"""Note of a manifest to what was wrong with the rows that it counts."""

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
    texts, groups = "sizes unknown", f"{plural(len(exp.task.languages), 'language')}; "
    if plan.data and "columns" in plan.data:
        groups = f"{len(plan.data['languages'])} groups; " if "group" in plan.data["columns"] else ""
    if people.train:
        trains = (*people.train, *people.train_unseen)
        texts = f"{int(median(trains))} training texts in the middle ({min(trains)} to {max(trains)})"
    rows = {
        "task": f"{exp.task.title}: {people.seen} seen and {people.unseen} unseen clients, {groups}{texts}",
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
    owners, title = ("SHARED", "PRIVATE", "EPHEMERAL"), "Numbers that methods declare, per client"
    alone = ("adapters\nwithout head",) if any(sizes.adapter for sizes in plan.sizes.values()) else ()
    last = "generator or optimizer state"
    table = plain_table("method", *owners, *alone, last, title=title, numbers=(*owners, *alone))
    for name, sizes in plan.sizes.items():
        generators = [f"{'-'.join(map(str, g.widths))} with {g.parameters:,} parameters" for g in sizes.generators]
        generators += [f"AdamW's state, {sizes.state:,} more PRIVATE ones"] if sizes.state else []
        counts = (sizes.shared, sizes.private - sizes.state, sizes.ephemeral, *[sizes.adapter] * len(alone))
        table.add_row(method_name(name), *(f"{n:,}" if n else "" for n in counts), ", ".join(generators))
    console.print(table)


def _show_stages(console: Console, plan: Plan, stages: Sequence[StagePlan]) -> None:
    right = ("rounds", "cohort", "down/\nround", "up/\nround")
    table = plain_table("stage", *right, "artifact", "there", title="Stages", numbers=right)
    for row in plan.stages:
        stage, cost = row.stage, row.estimate
        name = stage.key if len(plan.exp.seeds) > 1 else _name(row)
        counts = (str(stage.rounds or ""), f"{cost.updates // stage.rounds}" if stage.rounds else f"all {cost.updates}")
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
    source = f"({fit.source}), {fit.usable:.0%} of it usable"
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


def show_data(console: Console, path: str, manifest: Mapping[str, Any]) -> None:
    """Prints what was found in a table of the user's own.

    Args:
        console: where to show.
        path: ``task.path``.
        manifest: of the prepared data, see `tasks.task.prepare`.
    """
    used = manifest["columns"]
    columns = ", ".join(
        f"{what} '{used[what]}'" for what in ("text", "pair", "label", "client", "group") if what in used
    )
    notes, clients = manifest["notes"], manifest["clients"]
    console.print(f"[bold]{'data':<8}[/] {notes['rows_read']:,} rows; {escape(columns)}", soft_wrap=True)
    if "client" not in used:
        alpha = manifest["config"]["alpha"]
        console.print(f"{'':<8} no column names a client: dealt with Dirichlet label skew, task.alpha = {alpha:g}")
    if files := _files(Path(path).expanduser()):
        console.print(f"{'':<8} files: {escape(files)}", soft_wrap=True)
    console.print(f"{'':<8} split: {escape(str(notes['split']))}")
    numbers = ("clients", "train", "test", "smallest\nclient", "median\nclient", "largest\nclient")
    table = plain_table("pool", *numbers, title="Rows", numbers=numbers)
    for pool in POOLS:
        some = [client for client in clients if client["id"].startswith(f"{pool}/")]
        if some:
            sizes = [client["n_train"] + client["n_test"] for client in some]
            train, test = (sum(client[name] for client in some) for name in ("n_train", "n_test"))
            counts = (len(some), train, test, min(sizes), round(median(sizes)), max(sizes))
            table.add_row(pool, *(f"{count:,}" for count in counts))
    console.print(table)
    if len(manifest["labels"]) > 1:
        _show_labels(console, manifest)
    for sentence in _findings(manifest):
        console.print(f"[yellow]•[/] {escape(sentence)}")


def _files(folder: Path) -> str:
    """Which files of a folder are for what; empty for a single file and what the hub or ``datasets`` keeps."""
    if not folder.is_dir() or is_saved(folder):
        return ""
    by_part: dict[str | None, list[str]] = {}
    for path, part in data_files(folder):
        by_part.setdefault(part, []).append(str(path.relative_to(folder)))
    if None in by_part:
        return f"{listed(by_part[None])}; no name says a split"
    return "; ".join(f"{listed(names)} ({part})" for part, names in by_part.items())


def _show_labels(console: Console, manifest: Mapping[str, Any]) -> None:
    what = "group" if manifest.get("kind") == "generation" else "label"
    table = plain_table(what, "train", "test", title=f"{what.capitalize()}s", numbers=("train", "test"))
    labels, counts = manifest["labels"], _class_counts(manifest)
    for label, train, test in list(zip(labels, *counts, strict=True))[:MOST_LABELS]:
        table.add_row(escape(label), f"{train:,}", f"{test:,}")
    if (more := len(labels) - MOST_LABELS) > 0:
        table.add_row(f"[dim]and {more} more[/]", *(f"{sum(count[MOST_LABELS:]):,}" for count in counts))
    console.print(table)


def _class_counts(manifest: Mapping[str, Any]) -> list[list[int]]:
    """Train and test rows of each label, over all clients."""
    parts = ([client[name] for client in manifest["clients"]] for name in ("train_classes", "test_classes"))
    return [[sum(column) for column in zip(*part, strict=True)] for part in parts]


def _findings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is allowed but worth knowing."""
    notes, config = manifest["notes"], manifest["config"]
    texts = "examples" if manifest.get("kind") == "generation" else "texts"
    for name, why in _DROPPED.items():
        if count := notes.get(name):
            yield f"{count:,} rows left out: {why}."
    dropped = sum(notes.get(name, 0) for name in _DROPPED)
    if unused := notes["rows_read"] - dropped - manifest["rows"]:
        keys = {"max_examples": None, "drop_duplicates": False, "clients_kept": None}
        set_to = [f"task.{key}={config[key]}" for key, neutral in keys.items() if config[key] != neutral]
        yield f"{unused:,} rows take no part ({', '.join(set_to).lower()})."
    if unused := notes["unused_test_texts"]:
        yield f"{unused:,} test texts have a label that no train text of their pool has, and belong to no client."
    if same := notes["leak_seen_train_test"] + notes["leak_unseen_train_test"]:
        way = "" if config["drop_duplicates"] else "; task.drop_duplicates=true takes them out of test"
        yield f"{same:,} {texts} are in train and in test{way}."
    if same := notes["leak_seen_unseen"]:
        yield f"{same:,} {texts} are with seen and with unseen clients."
    names = [client["id"].rpartition("/")[2] for client in manifest["clients"]]
    for what, known in (("clients", names if "client" in manifest["columns"] else []), ("labels", manifest["labels"])):
        if alike := look_alikes(known):
            yield f"These {what} differ only in case, blanks or Unicode form: {listed(alike, separator='; ')}."
    if manifest.get("kind") != "generation":
        train, test = _class_counts(manifest)
        if untrained := [name for name, n, m in zip(manifest["labels"], train, test, strict=True) if m and not n]:
            yield f"Labels that only test rows have: {listed(untrained)}."
