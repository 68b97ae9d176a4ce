"""The files of ``fedtailor compare``: Markdown, two CSV and a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

from fedtailor.core.errors import StorageError
from fedtailor.core.files import refuse_used, staged_folder
from fedtailor.experiment.stages import short_hash
from fedtailor.report import names
from fedtailor.report.compare import Comparison, Rows, RunPair, compare
from fedtailor.report.compare_wandb import on_wandb
from fedtailor.report.curves import budget_panels, without_floor
from fedtailor.report.grid import Grid, markdown, plain
from fedtailor.report.loss_curves import loss_curves
from fedtailor.report.names import ABSENT
from fedtailor.report.significance import LEVEL, MARKS, interval_text, p_text, table
from fedtailor.report.style import DASHES, MUTED, Drawing, drawable, looks, save, styled
from fedtailor.storage.files import Storage

TEXT = "compare.md"

_RULE = (
    "Later run minus earlier run, in {phrase} points. Each client's {phrase} is averaged over the seeds for which both "
    "runs have the same clients (the same texts); the difference is then tested over clients with a paired t-test "
    "(two-sided), which takes clients as independent. p-values are Holm-corrected over all pairs of a pool and budget, "
    "methods without a budget by themselves; ▲ better and ▼ worse mark those below {level:g}. The 95 % intervals are "
    "of the single comparisons, without correction. With few seeds this says little on how the runs would fare when "
    "trained anew."
)

_MARKERS = "os^DvPX*"


def compare_runs(storage: Storage, run_ids: Sequence[str], out: Path | None = None) -> tuple[Comparison, Path]:
    """Compares runs and writes ``compare.md``, ``.csv``, ``.png``, ``.svg`` and ``compare_pairs.csv``.

    Where two methods or runs trained in rounds, ``training_loss.png`` and ``.svg``, too.

    Args:
        storage: where the runs are.
        run_ids: two or more; a difference is a later one minus an earlier one.
        out: new folder; default: ``compare-<hash of the run ids>`` in the storage, which replaces an earlier one.

    Returns:
        What was found, and the folder.

    Raises:
        ConfigError, StorageError: see `compare`; also if ``out`` is not empty, or the storage is not local and
            ``out`` is not given.
    """
    folder = _folder(storage, run_ids, out)
    content = compare(storage, run_ids)
    content = replace(content, wandb=on_wandb(content.runs, document(content)))
    with staged_folder(folder) as stage:
        write(content, stage)
    return content, folder


def write(content: Comparison, folder: Path) -> None:
    """Writes all files; equal runs give equal bytes."""
    with styled(content.run_ids):
        losses = _losses(content)
        for figure in filter(None, (_draw(content), losses)):
            save(figure, folder)
    for name, frame in (("compare.csv", content.results), ("compare_pairs.csv", _pairs_csv(content.pairs))):
        frame.to_csv(folder / name, index=False, lineterminator="\n")
    (folder / TEXT).write_text(document(content, losses), encoding="utf-8", newline="\n")


def _losses(content: Comparison) -> Drawing | None:
    """Training losses of all runs in one figure, where there are two lines or more."""
    drawn = loss_curves({run.run_id: (run.rounds, run.exp) for run in content.runs})
    return drawn if isinstance(drawn, Drawing) else None


def _folder(storage: Storage, run_ids: Sequence[str], out: Path | None) -> Path:
    if out is not None:
        refuse_used(out)
        return out
    if not storage.is_local:
        raise StorageError(f"{storage.url} is not a local folder; give --out a new folder for the comparison")
    own = storage.local_path(f"compare-{short_hash(list(run_ids))[:8]}")
    if own.exists() and not (own / TEXT).is_file():
        raise StorageError(f"{own} is there and is no comparison; give --out a new folder")
    return own


def _pairs_csv(pairs: Sequence[RunPair]) -> pd.DataFrame:
    """The columns of ``significance.csv`` with run, earlier run and seeds in place of the other method."""
    frame = table(pairs).drop(columns="other")
    frame.loc[[pair.same for pair in pairs], "verdict"] = "same"
    frame.insert(3, "run", [pair.run for pair in pairs])
    frame.insert(4, "other_run", [pair.earlier for pair in pairs])
    frame.insert(5, "seeds", [" ".join(map(str, pair.seeds)) for pair in pairs])
    return frame


def document(content: Comparison, losses: Drawing | None = None) -> str:
    """``compare.md``; ``losses``: the figure of training losses beside it."""
    ids, measure = content.run_ids, content.measure
    parts = [f"# {plain(' · '.join(ids))}", "## Runs", markdown(by_key("", ids, content.facts))]
    parts += ["\n".join(f"- {plain(note)}" for note in content.notes)] if content.notes else []
    changed = markdown(by_key("Key", ids, content.changed)) if content.changed else "No key that can change a number."
    parts += ["## What differs", changed]
    if content.neutral:
        parts.append(f"Differ too, but change no number here: {plain(', '.join(content.neutral))}.")
    pools, called = names.in_pool_order(content.results["pool"]), {run_id: run_id for run_id in ids}
    rule = (
        f"{measure.title} in percent, {measure.mean}: mean (SD) over seeds; the best of each budget in bold. Clients "
        "and seeds are those behind a row. A method without budgets has the same number at each."
    )
    for pool in pools:
        parts.append(f"## {plain(names.pool_name(pool))}: {measure.phrase} (%)")
        parts.append(markdown(replace(results_grid(content, pool, called), caption=[rule])))
    parts += [f"![{measure.title} per budget](compare.svg)", plain(_caption(content))]
    if losses:
        parts += [f"![{losses.title}]({losses.name}.svg)", plain(losses.caption)]
    rule = _RULE.format(phrase=measure.phrase, level=LEVEL)
    for pool in pools:
        grid = pairs_grid(content, pool, called)
        if grid.rows:
            parts.append(f"## {plain(names.pool_name(pool))}: paired differences")
            parts.append(markdown(replace(grid, caption=[rule])))
    if content.wandb:
        parts += ["## W&B", "\n".join(f"- {sentence}" for sentence in content.wandb)]
    return "\n\n".join(parts) + "\n"


def at_every_budget(results: pd.DataFrame) -> pd.DataFrame:
    """The results with methods without budgets (``flat``) at every budget; ``best`` of each pool and budget."""
    budgets = sorted({int(r) for r in results["budget"]} - {-1}) or [-1]
    rows = results.assign(flat=results["budget"] == -1)
    rows["budget"] = rows["budget"].map(lambda r: budgets if r == -1 else [r])
    rows = rows.explode("budget").astype({"budget": int})
    return rows.assign(best=rows["mean"] >= rows.groupby(["pool", "budget"])["mean"].transform("max") - 1e-9)


def by_key(title: str, names: Sequence[str], rows: Rows) -> Grid:
    """A row per key, a column per run."""
    return Grid([title, *names], [[key, *values] for key, values in rows], labels=1 + len(names))


def results_grid(content: Comparison, pool: str, called: Mapping[str, str]) -> Grid:
    """Results of a pool, a row per run and method; ``called``: run id to what it is called."""
    frame = at_every_budget(content.results)
    budgets, here = sorted(set(frame["budget"])), frame[frame["pool"] == pool]
    rows: list[list[str]] = []
    bold: set[tuple[int, int, int]] = set()
    runs = []
    for (run, method), line in here.groupby(["run", "method"], sort=False):
        cells = dict(zip(line["budget"], line.itertuples(), strict=True))
        bold |= {(len(rows), 2 + k, 0) for k, budget in enumerate(budgets) if budget in cells and cells[budget].best}
        shown = [ABSENT if budget not in cells else _mean(cells[budget]) for budget in budgets]
        clients = names.format_range(round(n) for n in line["n_clients"])
        rows.append([called[str(run)], names.method_name(str(method)), *shown, f"{clients} × {line['n_seeds'].max()}"])
        runs.append(run)
    rules = {k + 1 for k, (before, run) in enumerate(pairwise(runs)) if run != before}
    return Grid(["Run", "Method", *map(_title, budgets), "Clients × seeds"], rows, bold, rules=rules, labels=2)


def _mean(cell: Any) -> str:
    return names.percent(cell.mean) + ("" if np.isnan(cell.sd) else f" ({names.percent(cell.sd)})")


def pairs_grid(content: Comparison, pool: str, called: Mapping[str, str], brief: bool = False) -> Grid:
    """Paired differences in a pool, methods together.

    Args:
        content: the comparison; ``pool``: one of its pools.
        called: run id to its name in the table.
        brief: no intervals, and differences to the first run alone, unless there are none.
    """
    budgets, ids = sorted(set(at_every_budget(content.results)["budget"])), content.run_ids
    pairs = [pair for pair in content.pairs if pair.pool == pool]
    if brief:
        pairs = [pair for pair in pairs if pair.earlier == ids[0]] or pairs
    found: dict[tuple[str, str, str], dict[int, RunPair]] = {}
    order = names.in_method_order(pair.method for pair in pairs)
    for pair in sorted(pairs, key=lambda p: (order.index(p.method), ids.index(p.earlier), ids.index(p.run))):
        where = budgets if pair.budget is None else [pair.budget]
        found.setdefault((pair.method, pair.earlier, pair.run), {}).update(dict.fromkeys(where, pair))
    rows = []
    for (method, earlier, run), at in found.items():
        cells = [_difference(at.get(budget), brief) for budget in budgets]
        clients = names.format_range(pair.n_clients for pair in at.values())
        seeds = names.format_range(len(pair.seeds) for pair in at.values())
        rows.append([f"{called[run]} – {called[earlier]}", names.method_name(method), *cells, f"{clients} × {seeds}"])
    end = -1 if brief else None
    header = ["Runs", "Method", *map(_title, budgets), "Clients × seeds"]
    return Grid(header[:end], [row[:end] for row in rows], labels=2)


def _difference(pair: RunPair | None, brief: bool) -> str:
    """``+1.20 ▲ [+0.40, +2.06] p 0.003``, in brief ``+1.20▲ (0.003)``; or that there is nothing to test."""
    if pair is None or pair.same:
        return "same stages" if pair else ABSENT
    gain, mark, p = names.points(pair.difference), MARKS[pair.verdict], p_text(pair.p_holm)
    if brief:
        return f"{gain}{mark}" + ("" if pair.p_holm is None else f" ({p})")
    rest = ABSENT if pair.p_holm is None else f"{interval_text(pair)} p {p}"
    return " ".join(filter(None, [gain, mark, rest]))


def _title(budget: int) -> str:
    return names.budget_title(None if budget == -1 else budget)


def _draw(content: Comparison) -> Drawing:
    """Scores against the budget, a panel per pool: colour shows the method, dashes and marker the run."""
    frame, ids, measure = at_every_budget(content.results), content.run_ids, content.measure
    frame = frame[frame["method"].isin(without_floor(frame["method"])[0])]
    budgets, pools, look = sorted(set(frame["budget"])), names.in_pool_order(frame["pool"]), looks(frame["method"])
    steep = names.in_method_order(frame.loc[~frame["flat"], "method"])
    figure, axes = budget_panels(pools, [None if r == -1 else r for r in budgets], measure, 5.0)
    figure.set_figwidth(0.6 + figure.get_figwidth())
    for axis, pool in zip(axes, pools, strict=True):
        for (run, method), rows in frame[frame["pool"] == pool].groupby(["run", "method"], sort=False):
            k, flat = ids.index(str(run)), bool(rows["flat"].all())
            if flat:
                x = np.linspace(-0.4, len(budgets) - 0.6, max(len(budgets), 2))
                rows = rows.iloc[[0] * len(x)]
            else:
                # Error bars of close lines stay apart: runs of a method together, methods beside each other.
                place = (steep.index(method) * len(ids) + k + 0.5) / (len(steep) * len(ids))
                x = np.array([budgets.index(r) for r in rows["budget"]]) + 0.6 * (place - 0.5)
            axis.errorbar(
                x, rows["mean"], yerr=None if flat or rows["sd"].isna().all() else rows["sd"].fillna(0.0), capsize=2,
                color=look[str(method)].colour, alpha=0.75 if flat else 1, linewidth=1.0 if flat else 1.5,
                elinewidth=1.0, **_style(k) | ({"marker": "none"} if flat else {}),
            )  # fmt: skip
        axis.set_xlim(-0.5, len(budgets) - 0.5)
    labels = [names.shortened(drawable(run_id), 44) for run_id in ids]
    runs = [Line2D([], [], color=MUTED, label=name, **_style(k)) for k, name in enumerate(labels)]
    columns = max(1, min(len(runs), 120 // (max(map(len, labels)) + 8)))
    figure.legend(handles=runs, loc="outside upper left", ncols=columns, columnspacing=1.6, handlelength=3.2)
    methods = [Line2D([], [], color=own.colour, linewidth=3.5, label=own.label) for own in look.values()]
    figure.legend(handles=methods, loc="outside lower left", ncols=min(len(methods), 7), handlelength=1.3)
    return Drawing("compare", f"{measure.title} per budget", _caption(content), figure)


def _caption(content: Comparison) -> str:
    methods, hidden = without_floor(content.results["method"])
    shown = content.results[content.results["method"].isin(methods)]
    bars = "one seed, so no error bars" if shown["sd"].isna().all() else "error bars: ± SD over seeds"
    flat = "; thin lines without markers: methods without a budget" if (shown["budget"] == -1).any() else ""
    mean = content.measure.mean.capitalize()
    rest = [f"{names.method_name(method)} is in the table only." for method in hidden]
    return " ".join([f"Colour: method; dashes and marker: run. {mean}, then over seeds; {bars}{flat}.", *rest])


def _style(run: int) -> dict[str, Any]:
    look = {"linestyle": DASHES[run % len(DASHES)], "marker": _MARKERS[run % len(_MARKERS)], "markersize": 6}
    return look | {"markeredgecolor": "white", "markeredgewidth": 0.5}
