"""One self-contained page: inline styles, figures as data, no scripts or requests."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedtailor.models.source import model_title
from fedtailor.report import names, significance, summary
from fedtailor.report.facts import RunFacts
from fedtailor.report.measures import ACCURACY, Measure
from fedtailor.report.names import ABSENT, budget_title, leaves, percent, plural, points, text
from fedtailor.report.scores import REFERENCE, TIE_RULE, Block
from fedtailor.report.significance import Pair, against_base, rule
from fedtailor.report.style import Drawing, Missing
from fedtailor.report.tables import SEPARATOR, languages_of
from fedtailor.tasks.task import TASKS


def render(
    facts: RunFacts, run: Mapping[str, Any], pools: Mapping[str, Sequence[Block]], pairs: Sequence[Pair],
    drawn: Sequence[tuple[Drawing | Missing, tuple[Path, ...]]], spent: pd.DataFrame, **shown: Any,
) -> str:  # fmt: skip
    """The page as text; every value from the run is HTML-escaped.

    Args:
        facts: facts of the run.
        run: content of ``run.json``, for the configuration and provenance sections.
        pools: pool to the blocks of its table.
        pairs: paired comparisons.
        drawn: figures with their files (png, svg), or why there is none.
        spent: `summary.cost_table`.
        shown: what the template takes as it is: ``notes`` (sentences on incomplete data), ``ties`` (method, budget and
            share of ranks tied at the threshold), ``captions`` (pool to the sentences of its table), ``measures`` (all
            of a generation run), ``measure_grids`` (pool to their table), ``more_grids`` (by method: learned ranks,
            mixes), ``fit`` (a regression's table, or None) and ``fit_sentence``.
    """
    versus = against_base(pairs)
    measure = next((block.measure for blocks in pools.values() for block in blocks), ACCURACY)
    page: str = (
        _environment()
        .get_template("report.html.jinja")
        .render(
            **shown,
            facts=facts,
            measure=measure,
            by=SEPARATOR,
            tiles=_tiles(facts, run, pools, measure),
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
            figures=[_figure(entry, files) for entry, files in drawn],
            spent=spent.to_dict("records"),
            config=leaves(run["config"]) if run.get("config") else [],
            stages=run.get("stages", ()),
            stage_keys=list(dict.fromkeys(key for stage in run.get("stages", ()) for key in stage)),
            provenance=[(key, leaves(run.get(key))) for key in ("hardware", "git", "versions") if run.get(key)],
            tie_rule=TIE_RULE,
            comparison_rule=rule(measure),
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
    environment.filters |= {
        "percent": percent, "points": points, "p": significance.p_text, "interval": significance.interval_text,
        "pair": significance.pair_title, "method": names.method_name, "pool": names.pool_name, "budget": budget_title,
        "language": names.language_name, "own_name": _own_name, "direction": names.text_direction, "text": names.text,
        "tag": lambda code: names.short_code(code).replace("_", "-"), "number": _number,
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


def _tiles(
    facts: RunFacts, run: Mapping[str, Any], pools: Mapping[str, Sequence[Block]], measure: Measure
) -> list[tuple[str, str]]:
    exp = facts.experiment
    seeds = sorted({seed for blocks in pools.values() for b in blocks for seed in b.seeds})
    budgets = sorted({b.budget for blocks in pools.values() for b in blocks if b.budget is not None})
    languages = {code for blocks in pools.values() for b in blocks for code in b.languages}
    entry = TASKS.get(exp.task.name)
    known = entry is not None and (entry.clients == "natural" or not entry.label_skew)
    evenly = known or not facts.dealt  # no Dirichlet draw
    share = exp.task.sorted_share
    skew = ("Alpha (label skew)", str(exp.task.alpha)) if share is None else ("Share sorted by label", str(share))
    clients = " + ".join(f"{blocks[0].n_clients} {pool}".strip() for pool, blocks in pools.items())
    tiles = [
        ("Task", exp.task.title),
        ("Model", model_title(exp.model)),
        ("Adapted layers L", str(facts.n_modules)),
        ("Clients", clients),
        (measure.groups.capitalize(), str(len(languages)) if languages else ""),
        ("Budgets r", ", ".join(map(str, budgets))),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Base", facts.base_line),
        ("Strategy", facts.strategy_line),
        ("Scale", str(exp.scale)),
        *([] if evenly else [skew]),
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


def _figure(entry: Drawing | Missing, files: tuple[Path, ...]) -> dict[str, str]:
    """``source`` is the data URI of the SVG, empty where ``caption`` says why there is no figure."""
    anchor = re.sub(r"[^a-z0-9]+", "-", entry.title.lower()).strip("-")
    if isinstance(entry, Missing):
        return {"anchor": anchor, "title": entry.title, "caption": f"Left out: {entry.reason}.", "source": ""}
    source = f"data:image/svg+xml;base64,{base64.b64encode(files[1].read_bytes()).decode('ascii')}"
    return {"anchor": anchor, "title": entry.title, "caption": entry.caption, "source": source}
