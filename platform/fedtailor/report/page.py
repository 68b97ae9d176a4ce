"""One self-contained page: inline styles, figures as data, no scripts or requests."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedtailor.report import names, significance, summary
from fedtailor.report.facts import RunFacts
from fedtailor.report.grid import Grid
from fedtailor.report.metrics import ACCURACY, Measure
from fedtailor.report.names import ABSENT, budget_title, leaves, percent, plural, points, text
from fedtailor.report.scores import REFERENCE, TIE_RULE, Block
from fedtailor.report.significance import Pair, against, rule
from fedtailor.report.style import Drawing, Missing
from fedtailor.report.tables import SEPARATOR, languages_of
from fedtailor.tasks.task import TASKS


@dataclass(frozen=True)
class Figure:
    """A figure on the page: ``source`` is the data URI of its SVG, empty where ``caption`` says why there is none."""

    anchor: str
    title: str
    caption: str
    source: str


@dataclass(frozen=True)
class Content:
    """What the page shows.

    Args:
        facts: facts of the run.
        run: content of ``run.json``, for the configuration and provenance sections.
        pools: pool to the blocks of its table.
        pairs: paired comparisons.
        drawn: figures with their files (png, svg), or why there is none.
        notes: sentences on incomplete data.
        ties: (method, budget) to share of ranks tied at the threshold.
        spent: `summary.cost_table`.
        grids: pool to its table.
        measures: all measures of a generation run.
        measure_grids: pool to their table.
    """

    facts: RunFacts
    run: Mapping[str, Any]
    pools: Mapping[str, Sequence[Block]]
    pairs: Sequence[Pair]
    drawn: Sequence[tuple[Drawing | Missing, tuple[Path, ...]]]
    notes: Sequence[str]
    ties: Mapping[tuple[str, int], float]
    spent: pd.DataFrame
    grids: Mapping[str, Grid]
    measures: Sequence[Measure]
    measure_grids: Mapping[str, Grid]

    @property
    def measure(self) -> Measure:
        """What the tables show."""
        return next((block.measure for blocks in self.pools.values() for block in blocks), ACCURACY)


def render(content: Content) -> str:
    """The page as text; every value from the run is HTML-escaped."""
    facts, run, pools, pairs = content.facts, content.run, content.pools, content.pairs
    versus = against(pairs)
    page: str = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            facts=facts,
            measure=content.measure,
            measures=content.measures,
            measure_grids=content.measure_grids,
            by=SEPARATOR,
            tiles=_tiles(facts, run, pools),
            headlines=[_headline(blocks, versus) for blocks in pools.values()],
            pools=pools,
            methods={
                pool: names.in_method_order(m for b in blocks for m in b.methods) for pool, blocks in pools.items()
            },
            languages={pool: languages_of(blocks) for pool, blocks in pools.items()},
            reference=names.method_name(REFERENCE),
            absent=ABSENT,
            versus=versus,
            marks=significance.MARKS,
            grids={pool: significance.by_pair(pairs, pool) for pool in names.in_pool_order(p.pool for p in pairs)},
            sentences={pool: significance.sentences(pairs, pool) for pool in pools},
            captions={pool: grid.caption for pool, grid in content.grids.items()},
            figures=[_figure(entry, files) for entry, files in content.drawn],
            notes=content.notes,
            ties=[(names.method_name(m), r, value) for (m, r), value in sorted(content.ties.items())],
            spent=content.spent.to_dict("records"),
            config=leaves(run["config"]) if run.get("config") else [],
            stages=_stages(run.get("stages")),
            provenance=[(key, leaves(run.get(key))) for key in ("hardware", "git", "versions") if run.get(key)],
            tie_rule=TIE_RULE,
            comparison_rule=rule(content.measure),
            cost_rule=summary.COST_RULE,
            load_rule=summary.LOAD_RULE,
        )
    )
    return page


def _environment() -> Environment:
    loader = PackageLoader("fedtailor.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "points": points, "p": significance.p_text}
    environment.filters |= {"language": names.language_name, "own_name": _own_name, "direction": names.text_direction}
    environment.filters |= {"tag": lambda code: names.short_code(code).replace("_", "-"), "number": _number}
    environment.filters |= {
        "method": names.method_name, "pool": names.pool_name, "interval": significance.interval_text,
        "pair": significance.pair_title, "budget": budget_title,
    }  # fmt: skip
    environment.tests["known"] = lambda value: not math.isnan(value)
    return environment


def _own_name(code: str) -> str | None:
    """A language's own name, where it says more than the English one."""
    own = names.own_name(code)
    return None if own is None or own.casefold() == names.language_name(code).casefold() else own


def _number(value: float) -> str:
    """A time or a speed: about three digits, thousands grouped; `ABSENT` where unknown."""
    if math.isnan(value):
        return ABSENT
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _tiles(facts: RunFacts, run: Mapping[str, Any], pools: Mapping[str, Sequence[Block]]) -> list[tuple[str, str]]:
    exp = facts.experiment
    seeds = sorted({seed for blocks in pools.values() for b in blocks for seed in b.seeds})
    budgets = sorted({b.budget for blocks in pools.values() for b in blocks if b.budget is not None})
    languages = {code for blocks in pools.values() for b in blocks for code in b.languages}
    entry = TASKS.get(exp.task.name)
    evenly = entry is not None and (entry.clients == "natural" or not entry.label_skew)  # no Dirichlet draw
    measure = next((b.measure for blocks in pools.values() for b in blocks), ACCURACY)
    clients = " + ".join(f"{blocks[0].n_clients} {pool}".strip() for pool, blocks in pools.items())
    tiles = [
        ("Task", exp.task.name),
        ("Model", exp.model.name),
        ("Adapted layers L", str(facts.n_modules)),
        ("Clients", clients),
        (measure.groups.capitalize(), str(len(languages)) if languages else ""),
        ("Budgets r", ", ".join(map(str, budgets))),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Base", facts.base_line),
        ("Strategy", facts.strategy_line),
        ("Scale", str(exp.scale)),
        *([] if evenly else [("Alpha (label skew)", str(exp.task.alpha))]),
        ("Status", facts.status),
        ("Failures", text(run.get("failures"))),
        ("Warnings", text(run.get("warnings"))),
    ]
    return [(name, value or ABSENT) for name, value in tiles]


def _headline(blocks: Sequence[Block], versus: Mapping[tuple[str, int | None, str], Pair]) -> str:
    """The best method of a pool in one sentence."""
    block, method = max(((b, m) for b in blocks for m in b.methods), key=lambda pair: pair[0].average[pair[1]].mean)
    where = "" if block.budget is None or method in block.without_budget else f" at r = {block.budget}"
    ties = [names.method_name(m) for m in block.methods if block.average[m].best and m != method]
    shared = f" (shared with {', '.join(ties)})" if ties else ""
    measure = block.measure
    number = measure.mean if measure.name == ACCURACY.name else f"{measure.title}, {measure.mean}"
    pool, top = names.pool_name(block.pool), percent(block.average[method].mean)
    best = f"{pool}: {names.method_name(method)}{where} has the highest {number}, {top} %{shared}"
    pair = versus.get((block.pool, block.budget, method))
    if pair is None:
        return f"{best}."
    base, gain = names.method_name(REFERENCE), points(pair.difference)
    clients = plural(pair.n_clients, "client")
    if pair.p_holm is None:
        return f"{best}; {gain} points over {base} ({clients}, so no test)."
    words = {"better": f"better than {base}", "worse": f"worse than {base}", "undecided": f"undecided against {base}"}
    test = (
        f"95 % interval {significance.interval_text(pair)}, {clients}, corrected p {significance.p_text(pair.p_holm)}"
    )
    return f"{best}; per client {gain} points over {base}, {words[pair.verdict]} ({test})."


def _figure(entry: Drawing | Missing, files: tuple[Path, ...]) -> Figure:
    anchor = re.sub(r"[^a-z0-9]+", "-", entry.title.lower()).strip("-")
    if isinstance(entry, Missing):
        return Figure(anchor, entry.title, f"Left out: {entry.reason}.", "")
    source = f"data:image/svg+xml;base64,{base64.b64encode(files[1].read_bytes()).decode('ascii')}"
    return Figure(anchor, entry.title, entry.caption, source)


def _stages(stages: Any) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the stages: one column per key where they are records, else one column."""
    if isinstance(stages, Mapping):
        stages = [
            {"key": key, **(value if isinstance(value, Mapping) else {"value": value})} for key, value in stages.items()
        ]
    records = [stage if isinstance(stage, Mapping) else {"key": stage} for stage in stages or ()]
    columns = list(dict.fromkeys(str(key) for record in records for key in record))
    return columns, [[text(record.get(column)) for column in columns] for record in records]
