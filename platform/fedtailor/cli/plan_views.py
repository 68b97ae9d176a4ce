"""What `plan` shows: stages, traffic, memory and work as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedtailor.cli.terminal import plain_table, show_privacy
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.estimate import Estimate
from fedtailor.experiment.fit import USABLE, Fit
from fedtailor.experiment.plan import Plan, StagePlan, seconds_per_client
from fedtailor.experiment.privacy import masked_traffic
from fedtailor.report.names import method_name

_PARTS = ("base", "adapters", "gradients,\nAdam", "activations", "logits", "cache of\nanswers", "at most")


_THERE = {True: "[green]yes[/]", False: "no", None: "[dim]?[/]"}


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
        table.add_row(escape(name), *_fit_cells(needs))
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
        table.add_row(name, *_fit_cells(option.needs), "[green]yes[/]" if option.fits else "[red]no[/]")
    return table


def _fit_cells(needs: Estimate) -> list[str]:
    optimizer = needs.trained - needs.adapters
    parts = (needs.weights, needs.adapters, optimizer, needs.activations, needs.logits, needs.cache, needs.memory)
    return [size(part) if part else "" for part in parts]


def show_plan(console: Console, plan: Plan) -> None:
    """Prints the whole plan."""
    _show_header(console, plan)
    _show_trained(console, plan)
    _show_stages(console, plan)
    if plan.fit is None:
        _show_memory(console, plan)
    else:
        show_fit(console, plan.fit, [(_name(row), row.estimate) for row in _first_seed(plan)], plan.exp)
    _show_work(console, plan)
    for note in plan.notes:
        console.print(f"[yellow]•[/] {escape(note)}", highlight=False)


def _show_header(console: Console, plan: Plan) -> None:
    exp, people, model = plan.exp, plan.population, plan.model
    texts = "sizes unknown"
    if people.train:
        texts = f"{people.middle} training texts in the middle ({people.smallest} to {people.largest})"
    rows = {
        "task": f"{exp.task.name}: {people.seen} seen and {people.unseen} unseen clients, "
        f"{len(exp.task.languages)} languages; {texts}",
        "model": f"{exp.model.name}{_kept(plan)}: {model.parameters:,} parameters, L = {model.layers} adapted linear "
        "layers",
        "budgets": f"r = {', '.join(map(str, exp.budgets))} (r L = "
        f"{', '.join(str(r * model.layers) for r in exp.budgets)} ranks); r_max = {exp.r_max}",
        "seeds": ", ".join(map(str, exp.seeds)),
        **({} if exp.attack.name == "none" else {"attack": str(exp.attack)}),
    }
    for name, value in rows.items():
        console.print(f"[bold]{name:<8}[/] {escape(value)}", highlight=False)
    show_privacy(console, exp, 6, people.seen)


def _kept(plan: Plan) -> str:
    """How a language model's base is kept."""
    return "" if plan.fit is None else f" in {plan.exp.model.weights}"


def _show_trained(console: Console, plan: Plan) -> None:
    table = plain_table(
        "method", "SHARED", "PRIVATE", "EPHEMERAL", "generator",
        title="Numbers that methods declare, per client", numbers=("SHARED", "PRIVATE", "EPHEMERAL"),
    )  # fmt: skip
    for name, sizes in plan.sizes.items():
        shapes = [("-".join(map(str, g.widths)), g.parameters) for g in sizes.generators]
        generators = [f"{widths} with {count:,} parameters" for widths, count in shapes]
        counts = [f"{n:,}" if n else "" for n in (sizes.shared, sizes.private, sizes.ephemeral)]
        table.add_row(method_name(name), *counts, ", ".join(generators))
    console.print(table)


def _show_stages(console: Console, plan: Plan) -> None:
    right = ("rounds", "cohort", "down/\nround", "up/\nround")
    table = plain_table("stage", *right, "artifact", "there", title="Stages", numbers=right)
    for row in plan.stages:
        stage, cost = row.stage, row.estimate
        artifact = stage.artifact.rpartition("-")[2][:8] if row.there is not None else "[dim]?[/]"
        wire = (size(cost.down), size(cost.up)) if cost.down else ("", "")
        rounds = stage.kind != "personalise"
        counts = (str(stage.rounds), str(stage.cohort)) if rounds else ("", f"all {cost.updates}")
        table.add_row(
            escape(stage.key if len(plan.exp.seeds) > 1 else _name(row)), *counts, *wire, artifact, _THERE[row.there]
        )
    console.print(table)
    for row in _first_seed(plan):
        shared = plan.sizes[row.stage.method].shared
        masked = masked_traffic(plan.exp, plan.population.seen, row.stage.kind, shared) if row.stage.rounds else None
        if masked is not None:
            console.print(
                f"[dim]{escape(_name(row))}: under masks a client sends {size(masked.up)} a round instead of "
                f"{size(4 * shared)}, and receives {size(masked.down)} of keys and shares[/]",
                highlight=False,
            )
    if any(row.there is None for row in plan.stages):
        console.print("[dim]? unknown without weights: names and what is already there follow from their hash[/]")


def _show_memory(console: Console, plan: Plan) -> None:
    numbers = ("base\nweights", "trained x lanes,\nwith Adam", "activations", "sum")
    table = plain_table("stage", *numbers, title="Memory of one worker (estimate, float32)", numbers=numbers)
    for row in _first_seed(plan):
        cost = row.estimate
        parts = (cost.weights, cost.trained, cost.activations, cost.memory)
        table.add_row(escape(_name(row)), *(size(n) if n else "" for n in parts))
    console.print(table)


def _show_work(console: Console, plan: Plan) -> None:
    known = seconds_per_client(plan.exp)
    workers = plan.exp.engine.actors
    numbers = ("client\nupdates", "steps", "FLOP at\nmost", "time on\none worker")
    seeds = f"all {len(plan.exp.seeds)} seeds" if len(plan.exp.seeds) > 1 else "one seed"
    table = plain_table("stage", *numbers, title=f"Work, {seeds}", numbers=numbers)
    totals = [0.0, 0.0, 0.0, 0.0]
    for row in _first_seed(plan):
        times = sum(_name(other) == _name(row) for other in plan.stages)
        cost, each = row.estimate, known.get((row.stage.kind, row.stage.method))
        values = [cost.updates * times, (cost.steps or 0) * times, (cost.flops or 0) * times]
        seconds = each * cost.updates * times if each is not None else None
        totals = [a + b for a, b in zip(totals, [*values, seconds or 0.0], strict=True)]
        table.add_row(escape(_name(row)), *_cells(values, seconds))
    complete = all((row.stage.kind, row.stage.method) in known for row in plan.stages)
    table.add_section()
    table.add_row("[bold]sum[/]", *_cells(totals[:3], totals[3] if complete else None))
    console.print(table)
    if not known:
        console.print("[dim]No earlier run of this task and model in the storage: no time can be given.[/]")
    elif workers and workers > 1:
        console.print(f"[dim]{workers} workers need about 1/{workers} of the time.[/]", highlight=False)


def _cells(values: list[float], seconds: float | None) -> list[str]:
    updates, steps, flops = values
    return [
        f"{updates:,.0f}",
        f"{steps:,.0f}" if steps else "",
        f"{flops:.1e}" if flops else "",
        duration(seconds) if seconds is not None else "",
    ]


def duration(seconds: float) -> str:
    """``4 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _first_seed(plan: Plan) -> list[StagePlan]:
    """One stage of each name; a base that seeds share has its own seed."""
    return list({_name(row): row for row in reversed(plan.stages)}.values())[::-1]


def _name(row: StagePlan) -> str:
    return row.stage.key.rsplit("/", 1)[0]
