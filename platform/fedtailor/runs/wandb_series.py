"""What W&B is fed: curves, final results and their table, computed from committed metrics alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtailor.runs.digest import DONE
from fedtailor.runs.run_folder import RunFolder

if TYPE_CHECKING:
    import pandas as pd


def settled(run: RunFolder, metrics: pd.DataFrame) -> pd.DataFrame:
    """Rows of rounds to which no later sync can add an earlier one: up to the first stage that is not finished.

    Stages may finish out of order (another run may have made one of them), and W&B takes steps in ascending order
    only: a point that came too late would be missing for ever.
    """
    known = []
    for stage in run.stages():
        if stage["kind"] == "personalise":
            continue
        known.append((stage["kind"], stage["method"], stage["seed"]))
        if not _done(run, stage):
            break
    rows = metrics.set_index(["stage", "method", "seed"]).index.isin(known)
    return metrics[rows]


def is_complete(run: RunFolder) -> bool:
    """Whether every stage is finished, so that no point will ever be added."""
    return all(_done(run, stage) for stage in run.stages())


def series(metrics: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Points of all curves in the order of their commits: means over clients, weighted by examples.

    Yields:
        ``{"round": 3, "strategy/fedp2eft/seed42/psg_loss": 0.12, ...}``, one per stage, seed and round.
    """
    rows = metrics[(metrics["stage"] != "personalise") & (metrics["weight"] > 0)]
    points: Any = rows.groupby(["stage", "method", "seed", "round"], sort=False)
    for (stage, method, seed, number), point in points:
        name = f"{stage}/seed{seed}" if stage == "base" else f"{stage}/{method}/seed{seed}"
        values = {
            f"{name}/{metric}": float(np.average(part["value"], weights=part["weight"]))
            for metric, part in point.sort_values(["metric", "client"]).groupby("metric")
        }
        yield {"round": int(number), **values}


def final_results(metrics: pd.DataFrame) -> tuple[dict[str, float], pd.DataFrame]:
    """Summary values ``final/<pool>/<method>/r<budget>/<metric>`` and the table per language behind them."""
    from fedtailor.runs.report.results import AVERAGE, checked, results_table, scores

    scored = scores(checked(metrics))
    if scored.empty:
        return {}, scored
    table = results_table(scored)
    summary = {}
    for row in table[table["language"] == AVERAGE].to_dict("records"):
        budget = f"/r{row['budget']}" if row["budget"] >= 0 else ""
        summary[f"final/{row['pool']}/{row['method']}{budget}/{row['metric']}"] = float(row["mean"])
    return summary, table


def _done(run: RunFolder, stage: Mapping[str, Any]) -> bool:
    return run.storage.exists(f"artifacts/{stage['artifact']}/{DONE}")
