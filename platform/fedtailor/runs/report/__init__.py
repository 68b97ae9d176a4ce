"""The report of a run: numbers (CSV, JSON), the paper's tables (Markdown, LaTeX), figures, one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fedtailor.core.messages import FloatArray
from fedtailor.runs.report import figures, html, results, summary, tables
from fedtailor.runs.report.facts import read_facts
from fedtailor.runs.report.names import in_pool_order

__all__ = ["write_report"]


def write_report(
    run: Mapping[str, Any],
    metrics: pd.DataFrame,
    strategies: Mapping[tuple[str, int], Mapping[str, FloatArray]],
    modules: Sequence[str],
    out: Path,
) -> dict[str, Path]:
    """Writes everything a reader needs into ``out``. Equal input, in any order of rows, gives equal bytes.

    Incomplete data are fine: what cannot be made is left out, and the page says why.

    Args:
        run: content of ``run.json``: run_id, config (nested), overrides ({key, default, value} each), stages,
            versions, hardware, git, status; optionally failures and warnings (counts or lists).
        metrics: rows of `fedtailor.core.messages.METRIC_COLUMNS`.
        strategies: (method, seed) to client to lambda, (L, r_init) float32.
        modules: names of the L adapted modules.
        out: folder, made if missing; files of an earlier report are replaced.

    Returns:
        files by their name relative to ``out``: ``results.csv``, ``summary.json``, ``report.html``,
        ``table_<pool>.md`` and ``.tex``, ``figures/<name>.png`` and ``.svg``.

    Raises:
        DataError: a metric column is missing, a number is given twice, or an accuracy is outside [0, 1].
    """
    frame = results.checked(metrics)
    scored = results.scores(frame)
    found = results.blocks(scored)
    facts = read_facts(run, len(modules))
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    results.results_table(scored).to_csv(out / "results.csv", index=False, lineterminator="\n")
    _write(
        out / "summary.json",
        json.dumps(_summary(facts.run_id, found), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
    )
    for pool in in_pool_order(block.pool for block in found):
        blocks = [block for block in found if block.pool == pool]
        _write(out / f"table_{tables.file_label(pool)}.md", tables.markdown_table(facts, blocks))
        _write(out / f"table_{tables.file_label(pool)}.tex", tables.latex_table(facts, blocks))
    drawn = figures.draw(frame, scored, found, strategies, modules, out / "figures")
    page = html.render(facts, run, found, drawn, summary.gaps(scored), summary.tied_shares(frame))
    _write(out / "report.html", page)
    return {path.relative_to(out).as_posix(): path for path in _report_files(out)}


def _summary(run_id: str, found: list[results.Block]) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "metric": "accuracy",
        "unit": "fraction",
        "seeds": sorted({seed for block in found for seed in block.seeds}),
        "tie_rule": results.TIE_RULE,
        "comparison_rule": results.COMPARISON_RULE,
        "results": summary.summary_records(found),
    }


def _report_files(out: Path) -> list[Path]:
    patterns = (
        "report.html",
        "results.csv",
        "summary.json",
        "table_*.md",
        "table_*.tex",
        "figures/*.png",
        "figures/*.svg",
    )
    return sorted(path for pattern in patterns for path in out.glob(pattern))


def _remove_earlier(out: Path) -> None:
    for path in _report_files(out):
        path.unlink()


def _write(path: Path, words: str) -> None:
    path.write_text(words, encoding="utf-8", newline="\n")
