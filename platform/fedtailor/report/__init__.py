"""The report of a run: numbers (CSV, JSON), the paper's tables (Markdown, LaTeX, CSV), figures, one HTML page.

`write_report` makes all files from checked rows; `report_of` reads them from a run folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from fedtailor.core.errors import StorageError
from fedtailor.core.files import refuse_used
from fedtailor.methods.external import add_stored
from fedtailor.report import regression, samples, scores, significance
from fedtailor.report.curves import per_budget, per_language, round_means, training_curves
from fedtailor.report.facts import RunData, gather, read_facts
from fedtailor.report.grid import write_grids
from fedtailor.report.heatmaps import Strategies, lambda_distance, population_figures, rank_structure
from fedtailor.report.learned_ranks import learned_ranks, ranks_figure, ranks_grid
from fedtailor.report.loss_curves import loss_curves
from fedtailor.report.measures import no_answer_sentence
from fedtailor.report.mix_weights import mix_costs, mix_figures, mix_grid, mix_rounds
from fedtailor.report.names import in_pool_order
from fedtailor.report.page import render
from fedtailor.report.scores import TIE_RULE, Block
from fedtailor.report.style import Drawing, Missing, class_label, language_label, save, styled
from fedtailor.report.summary import cost_table, gaps, summary_records, tied_shares
from fedtailor.report.tables import file_label, measure_blocks, measures_data, measures_grid, table_data, table_grid
from fedtailor.storage.files import join
from fedtailor.storage.run_folder import DONE, RunFolder
from fedtailor.tasks.squad import dropped_sentence

__all__ = ["RunData", "gather", "report_of", "write_report"]
PAGE = "report.html"


def write_report(
    run: Mapping[str, Any],
    metrics: pd.DataFrame,
    strategies: Strategies,
    modules: Sequence[str],
    out: Path,
    data: RunData,
) -> dict[str, Path]:
    """Writes everything a reader needs into ``out``. Equal input, in any order of rows, gives equal bytes.

    Incomplete data are fine: what cannot be made is left out, and the page says why.

    Args:
        run: content of ``run.json``, and status (one of `run_folder.STATES`), failures and warnings (numbers).
        metrics: rows of `fedtailor.core.messages.METRIC_COLUMNS`.
        strategies: (method, seed) to client to lambda, (L, r_init) float32.
        modules: names of the L adapted modules.
        out: folder, made if missing; files of an earlier report are replaced.
        data: what `gather` found besides.

    Returns:
        files by their name relative to ``out``: ``results.csv``, ``summary.json``, ``report.html``,
        ``table_<pool>.md``, ``.csv`` and ``.tex``, ``significance.md``, ``.csv`` and ``.tex``, ``cost.csv``,
        ``metrics_<pool>.md``, ``.csv`` and ``.tex`` (generation), ``ranks.md``, ``.csv`` and ``.tex`` (regression),
        ``learned_ranks.md``, ``.csv`` and ``.tex`` (methods that report what they add to a module),
        ``mixing.md``, ``.csv`` and ``.tex`` (methods that mix a client's own LoRA with the common one),
        ``figures/<name>.png`` and ``.svg``.

    Raises:
        DataError: a metric column is missing, a number is given twice, or a share is outside [0, 1].
    """
    frame = scores.checked(metrics)
    scored = scores.scored_rows(frame)
    measure, found = scores.primary(scored), scores.blocks(scored)
    pools = {pool: [b for b in found if b.pool == pool] for pool in in_pool_order(b.pool for b in found)}
    all_measures = measure_blocks(scored)
    facts = read_facts(run, len(modules), frame, data)
    pairs = significance.compare(scored, found)
    spent = cost_table(run.get("stages") or (), data.times, data.events)
    out.mkdir(parents=True, exist_ok=True)
    for path in _report_files(out):
        path.unlink()
    _csv(out / "results.csv", scores.results_table(scored))
    whole = {
        "run_id": facts.run_id, "metric": measure.name, "unit": "fraction",
        "seeds": sorted({seed for block in found for seed in block.seeds}), "tie_rule": TIE_RULE,
        "comparison_rule": significance.rule(measure), "results": summary_records(found, pairs, all_measures),
    }  # fmt: skip
    _write(out / "summary.json", json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    left_out = dropped_sentence(data.notes)
    grids = {pool: table_grid(facts, own, [left_out, no_answer_sentence(frame, pool)]) for pool, own in pools.items()}
    measure_grids = {pool: measures_grid(own, grids[pool].caption) for pool, own in all_measures.items()}
    for pool, grid in grids.items():
        write_grids([grid], table_data(pools[pool]), out, f"table_{file_label(pool)}")
    for pool, grid in measure_grids.items():
        write_grids([grid], measures_data(all_measures[pool]), out, f"metrics_{file_label(pool)}")
    if pairs:
        pages = significance.pairs_grids(pairs, facts.scale, measure)
        write_grids(pages, significance.table(pairs), out, "significance")
    fits = regression.seeds_table(frame, data.experiment) if data.kind == "regression" else pd.DataFrame()
    fit = regression.grid(fits, data.experiment) if len(fits) else None
    if fit:
        write_grids([fit], fits, out, "ranks")
    if len(spent):
        _csv(out / "cost.csv", spent)
    learned, costs = learned_ranks(frame, data.class_counts), mix_costs(frame, data.times)
    more_grids = [make(rows) for make, rows in ((ranks_grid, learned), (mix_grid, costs)) if len(rows)]
    for grid, rows in zip(more_grids, (rows for rows in (learned, costs) if len(rows)), strict=True):
        write_grids([grid], rows, out, grid.label.replace("-", "_"))
    drawn = _draw(frame, found, strategies, modules, data, learned, out / "figures")
    page = render(
        facts, run, pools, pairs, drawn, spent, more_grids=more_grids, notes=gaps(scored), ties=tied_shares(frame),
        captions={pool: grid.caption for pool, grid in grids.items()}, measures=scores.answer_measures(scored),
        measure_grids=measure_grids, fit=fit, fit_sentence=regression.sentence(fits) if fit else "",
    )  # fmt: skip
    _write(out / PAGE, page)
    return {path.relative_to(out).as_posix(): path for path in _report_files(out)}


def _draw(
    frame: pd.DataFrame, found: Sequence[Block], strategies: Strategies, modules: Sequence[str], data: RunData,
    learned: pd.DataFrame, folder: Path,
) -> list[tuple[Drawing | Missing, tuple[Path, ...]]]:  # fmt: skip
    """Every figure in reading order with its files (png, svg), or the reason why there is none."""
    folder.mkdir(parents=True, exist_ok=True)
    codes = {*frame["language"], *data.clients["language"]}
    labels = [language_label(code) for code in codes] + [class_label(x, k) for k, x in enumerate(data.labels)]
    with styled(labels):
        entries = [
            *per_budget(found),
            *per_language(found),
            *rank_structure(frame, modules),
            *ranks_figure(learned),
            *mix_figures(mix_rounds(frame)),
            *lambda_distance(frame, strategies),
            *regression.figures(frame),
            *training_curves(frame),
            loss_curves({"": (round_means(frame), data.experiment)}),
            *population_figures(frame, data),
        ]
        return [(e, save(e, folder) if isinstance(e, Drawing) else ()) for e in entries]


def _report_files(out: Path) -> list[Path]:
    stems = (
        "report.html", "results.csv", "summary.json", "cost.csv", "significance.*", "ranks.*", "learned_ranks.*",
        "mixing.*",
    )  # fmt: skip
    patterns = (*stems, "table_*.md", "table_*.tex", "table_*.csv", "metrics_*", "figures/*.png", "figures/*.svg")
    return sorted(path for pattern in patterns for path in out.glob(pattern))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _csv(path: Path, table: pd.DataFrame) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


def report_of(run: RunFolder, out: Path | None = None) -> Path | str:
    """Writes a run's report and returns its page.

    Args:
        run: at least one round of it is committed.
        out: new local folder; None: ``<run>/report/`` anew, on a remote storage by uploading it.

    Raises:
        ConfigError: a method from outside that is neither installed nor allowed.
        StorageError: nothing is committed yet, or ``out`` is not empty.
    """
    if out is not None:
        refuse_used(out)
        return _write_all(run, out)
    path = join(run.run_id, "report")
    if run.storage.is_local:
        return _write_all(run, run.storage.local_path(path))
    with TemporaryDirectory() as folder:
        page = _write_all(run, Path(folder))
        run.storage.delete(path)
        # The page last: whoever finds it finds what it shows.
        for file in sorted(Path(folder).rglob("*"), key=lambda file: (file == page, file)):
            if file.is_file():
                run.storage.upload(file, join(path, file.relative_to(folder).as_posix()))
    return f"{run.storage.url.rstrip('/')}/{path}/{PAGE}"


def _write_all(run: RunFolder, out: Path) -> Path:
    metrics = run.metrics()
    if metrics.empty:
        raise StorageError(f"run '{run.run_id}' has committed nothing yet that could be reported")
    add_stored(run.info()["config"].get("code", {}), run.run_id)
    warnings = sum(event.get("kind") == "warning" for event in run.events.entries())
    counts = {"failures": len(run.failures.entries()), "warnings": warnings}
    info = {**run.info(), "status": run.status()["state"], **counts}
    write_report(info, metrics, run.strategies(), modules_of(run), out, gather(run))
    (out / samples.FILE).unlink(missing_ok=True)
    if len(answers := samples.committed_answers(run)):
        _write(out / samples.FILE, samples.samples(answers))
    return out / PAGE


def modules_of(run: RunFolder) -> tuple[str, ...]:
    """The adapted linear layers, from the first finished stage that names them."""
    for stage in run.stages():
        path = f"artifacts/{stage['artifact']}/{DONE}"
        if run.storage.exists(path) and (found := run.storage.read_json(path)["modules"]):
            return tuple(str(name) for name in found)
    return ()
