"""One self-contained page: styles inline, figures as inline SVG that follow light and dark, no scripts, no requests."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from fedtailor.runs.report import names, tables
from fedtailor.runs.report.facts import Facts, at, leaves, text
from fedtailor.runs.report.results import COMPARISON_RULE, REFERENCE, TIE_RULE, Block
from fedtailor.runs.report.style import GRID, INK, MUTED, Drawing, Missing

_PAINT = {
    INK: "var(--ink)", MUTED: "var(--fig-muted)", GRID: "var(--fig-grid)", "#ffffff": "var(--card)",
    "#4a4f57": "var(--fig-base)",
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure on the page; ``svg`` is None where there is none, then ``caption`` says why."""

    anchor: str
    title: str
    caption: str
    svg: Markup | None


def render(
    facts: Facts,
    run: Mapping[str, Any],
    found: Sequence[Block],
    drawn: Sequence[tuple[Drawing | Missing, tuple[Path, ...]]],
    notes: Sequence[str],
    ties: Mapping[tuple[str, int], float],
) -> str:
    """The page as text; every value from the run is HTML-escaped.

    Args:
        facts: facts of the run.
        run: content of ``run.json``, for the configuration and provenance sections.
        found: blocks of the tables.
        drawn: figures with their files (png, svg), or why there is none.
        notes: sentences on incomplete data.
        ties: (method, budget) to share of ranks tied at the threshold.
    """
    loader = PackageLoader("fedtailor.runs.report", ".")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": tables.percent, "text": text, "versus": tables.versus_text}
    environment.filters |= {"language": names.language_name, "method": names.method_name, "pool": names.pool_name}
    pools = {pool: [b for b in found if b.pool == pool] for pool in names.in_pool_order(b.pool for b in found)}
    page: str = environment.get_template("report.html.jinja").render(
        facts=facts,
        tiles=_tiles(facts, run, pools),
        headlines=[_headline(blocks) for blocks in pools.values()],
        pools=pools,
        methods={pool: names.in_method_order(m for b in blocks for m in b.methods) for pool, blocks in pools.items()},
        block_title=tables.block_title,
        reference=names.method_name(REFERENCE),
        absent=tables.ABSENT,
        captions={pool: tables.caption(facts, blocks) for pool, blocks in pools.items()},
        figures=[_figure(entry, files) for entry, files in drawn],
        notes=notes,
        ties=[(names.method_name(m), r, value) for (m, r), value in sorted(ties.items())],
        config=leaves(run.get("config") or {}),
        stages=_stages(run.get("stages")),
        provenance=[(key, leaves(run.get(key))) for key in ("hardware", "git", "versions") if run.get(key)],
        tie_rule=TIE_RULE,
        comparison_rule=COMPARISON_RULE,
    )
    return page


def _tiles(facts: Facts, run: Mapping[str, Any], pools: Mapping[str, Sequence[Block]]) -> list[tuple[str, str]]:
    seeds = sorted({seed for blocks in pools.values() for b in blocks for seed in b.seeds})
    budgets = sorted({b.budget for blocks in pools.values() for b in blocks if b.budget is not None})
    languages = {code for blocks in pools.values() for b in blocks for code in b.languages}
    clients = " + ".join(f"{blocks[0].n_clients} {pool}".strip() for pool, blocks in pools.items())
    tiles = [
        ("Task", facts.task),
        ("Model", facts.model),
        ("Adapted layers L", str(facts.n_modules)),
        ("Clients", clients),
        ("Languages", str(len(languages)) if languages else ""),
        ("Budgets r", ", ".join(map(str, budgets))),
        ("Seeds", ", ".join(map(str, seeds))),
        ("Base", f"{facts.base}, {facts.base_rounds} rounds"),
        ("Strategy", f"{facts.strategy_rounds} rounds"),
        ("Alpha (label skew)", text(at(run.get("config"), "task.alpha"))),
        ("Status", facts.status),
        ("Failures", text(facts.failures)),
        ("Warnings", text(facts.warnings)),
    ]
    return [(name, value or tables.ABSENT) for name, value in tiles]


def _headline(blocks: Sequence[Block]) -> str:
    """The best method of a pool in one sentence."""
    block, method = max(((b, m) for b in blocks for m in b.methods), key=lambda pair: pair[0].average[pair[1]].mean)
    where = "" if block.budget is None or method not in block.versus else f" at r = {block.budget}"
    best = f"{names.method_name(method)}{where} has the highest mean over languages, {tables.percent(block.average[method].mean)} %"
    versus = block.versus.get(method)
    if versus is None:
        return f"{names.pool_name(block.pool)}: {best}."
    base = names.method_name(REFERENCE)
    verdict = {1: f"better than {base}", -1: f"worse than {base}", 0: f"not clearly different from {base}"}[versus.verdict]
    error = "" if versus.standard_error is None else f" ± {100 * versus.standard_error:.2f}"
    return (
        f"{names.pool_name(block.pool)}: {best}; per client {tables.points(versus.difference)}{error} points, {verdict} "
        f"(2 standard errors, {versus.n_clients} clients)."
    )


def _figure(entry: Drawing | Missing, files: tuple[Path, ...]) -> Figure:
    anchor = re.sub(r"[^a-z0-9]+", "-", entry.title.lower()).strip("-")
    if isinstance(entry, Missing):
        return Figure(anchor, entry.title, f"Left out: {entry.reason}.", None)
    return Figure(anchor, entry.title, entry.caption, inline_svg(files[1].read_text("utf-8"), entry.title))


def inline_svg(svg: str, title: str) -> Markup:
    """An SVG file as part of a page: no prolog, comments or metadata; ink, grid and paper become CSS variables.

    Args:
        svg: a file that `style.save` wrote; its texts are paths, so no run data is left in it once comments are gone.
        title: accessible name.
    """
    svg = re.sub(r"<!--.*?-->|<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for colour, variable in _PAINT.items():
        svg = svg.replace(colour, variable)
    width = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    size = f'style="width:{float(width[1]) * 4 / 3:.0f}px" ' if width else ""
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*pt"', r"<svg \1", re.sub(r'(<svg [^>]*?)height="[^"]*pt"', r"\1", svg))
    label = Markup('role="img" aria-label="{}" ').format(title)
    return Markup(re.sub(r"\n\s*", "\n", svg).strip().replace("<svg ", f"<svg {size}{label}", 1))


def _stages(stages: Any) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the stages: one column per key where they are records, else one column."""
    if isinstance(stages, Mapping):
        stages = [{"key": key, **(value if isinstance(value, Mapping) else {"value": value})} for key, value in stages.items()]
    records = [stage if isinstance(stage, Mapping) else {"key": stage} for stage in stages or ()]
    columns = list(dict.fromkeys(str(key) for record in records for key in record))
    return columns, [[text(record.get(column)) for column in columns] for record in records]
