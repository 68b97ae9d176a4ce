"""Write_report: all files of a report.

The report of a run: numbers (CSV, JSON), the paper's tables (Markdown, LaTeX), figures, one HTML page.

From a run folder to its report: gathers what `report` is told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pandas as pd

from fedtailor.core.errors import StorageError
from fedtailor.core.messages import FloatArray
from fedtailor.methods.external import add_stored
from fedtailor.report import cost, figures, significance, summary, tables
from fedtailor.report import metrics as metrics_of
from fedtailor.report import page as html
from fedtailor.report import scores as results
from fedtailor.report import significance as verdicts
from fedtailor.report.facts import RunData, gather, read_facts
from fedtailor.report.grid import write_grids
from fedtailor.report.metrics import Measure
from fedtailor.report.names import in_pool_order
from fedtailor.report.side_by_side import beside, measures_data, measures_grid
from fedtailor.storage.digest import DONE
from fedtailor.storage.files import join
from fedtailor.storage.run_folder import RunFolder

__all__ = ["RunData", "gather", "write_report"]


def write_report(
    run: Mapping[str, Any],
    metrics: pd.DataFrame,
    strategies: Mapping[tuple[str, int], Mapping[str, FloatArray]],
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
        ``metrics_<pool>.md``, ``.csv`` and ``.tex`` (generation), ``figures/<name>.png`` and ``.svg``.

    Raises:
        DataError: a metric column is missing, a number is given twice, or a share is outside [0, 1].
    """
    frame = results.checked(metrics)
    scored = results.scores(frame)
    measure, found = metrics_of.primary(scored), results.blocks(scored)
    pools = {pool: [b for b in found if b.pool == pool] for pool in in_pool_order(b.pool for b in found)}
    all_measures = beside(scored)
    facts = read_facts(run, len(modules), frame, data)
    pairs = significance.compare(scored, found)
    spent = cost.cost(run.get("stages") or (), data.times, data.events)
    out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(out)
    _csv(out / "results.csv", results.results_table(scored))
    _write(
        out / "summary.json",
        json.dumps(
            _summary(facts.run_id, measure, found, pairs, all_measures), indent=2, ensure_ascii=False, allow_nan=False
        )
        + "\n",
    )
    grids = {pool: tables.table_grid(facts, blocks) for pool, blocks in pools.items()}
    of_measures = {pool: measures_grid(blocks, grids[pool].caption) for pool, blocks in all_measures.items()}
    for pool, grid in grids.items():
        write_grids([grid], tables.table_data(pools[pool]), out, f"table_{tables.file_label(pool)}")
    for pool, grid in of_measures.items():
        write_grids([grid], measures_data(all_measures[pool]), out, f"metrics_{tables.file_label(pool)}")
    if pairs:
        write_grids(verdicts.pairs_grids(pairs, facts.scale, measure), significance.table(pairs), out, "significance")
    if len(spent):
        _csv(out / "cost.csv", spent)
    drawn = figures.draw(frame, found, strategies, modules, data, out / "figures")
    content = html.Content(
        facts, run, pools, pairs, drawn, summary.gaps(scored), summary.tied_shares(frame), spent, grids,
        metrics_of.shown_beside(scored), of_measures,
    )  # fmt: skip
    _write(out / "report.html", html.render(content))
    return {path.relative_to(out).as_posix(): path for path in _report_files(out)}


def _summary(
    run_id: str,
    measure: Measure,
    found: list[results.Block],
    pairs: list[significance.Pair],
    all_measures: Mapping[str, Sequence[results.Block]],
) -> dict[str, Any]:
    return {
        "run_id": run_id,
        "metric": measure.name,
        "unit": "fraction",
        "seeds": sorted({seed for block in found for seed in block.seeds}),
        "tie_rule": results.TIE_RULE,
        "comparison_rule": significance.rule(measure),
        "results": summary.summary_records(found, pairs, all_measures),
    }


def _report_files(out: Path) -> list[Path]:
    stems = ("report.html", "results.csv", "summary.json", "cost.csv", "significance.*")
    patterns = (*stems, "table_*.md", "table_*.tex", "table_*.csv", "metrics_*", "figures/*.png", "figures/*.svg")
    return sorted(path for pattern in patterns for path in out.glob(pattern))


def _remove_earlier(out: Path) -> None:
    for path in _report_files(out):
        path.unlink()


def _write(path: Path, words: str) -> None:
    path.write_text(words, encoding="utf-8", newline="\n")


def _csv(path: Path, table: pd.DataFrame) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


PAGE = "report.html"


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
    with TemporaryDirectory() as made:
        page = _write_all(run, Path(made))
        run.storage.delete(path)
        # The page last: whoever finds it finds what it shows.
        for file in sorted(Path(made).rglob("*"), key=lambda file: (file == page, file)):
            if file.is_file():
                run.storage.upload(file, join(path, file.relative_to(made).as_posix()))
    return f"{run.storage.url.rstrip('/')}/{path}/{PAGE}"


def refuse_used(out: Path) -> None:
    """Keeps ``--out`` from mixing with what is there.

    Raises:
        StorageError: the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is there already and not an empty folder")


def _write_all(run: RunFolder, out: Path) -> Path:
    metrics = run.metrics()
    if metrics.empty:
        raise StorageError(f"run '{run.run_id}' has committed nothing yet that could be reported")
    add_stored(run.info()["config"].get("code", {}), run.run_id)
    counts = {
        "failures": len(run.failures()), "warnings": sum(event.get("kind") == "warning" for event in run.events()),
    }  # fmt: skip
    info = {**run.info(), "status": run.status()["state"], **counts}
    write_report(info, metrics, run.strategies(), modules_of(run), out, gather(run))
    return out / PAGE


def modules_of(run: RunFolder) -> tuple[str, ...]:
    """The adapted linear layers, from the first finished stage that names them."""
    for stage in run.stages():
        path = f"artifacts/{stage['artifact']}/{DONE}"
        if run.storage.exists(path) and (found := run.storage.read_json(path)["modules"]):
            return tuple(str(name) for name in found)
    return ()
