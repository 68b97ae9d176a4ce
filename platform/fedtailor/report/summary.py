"""What a run amounts to: a record per pool, budget and method, what is missing, how many ranks tie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedtailor.report.metrics import primary
from fedtailor.report.names import in_method_order, in_pool_order, method_name, pool_name
from fedtailor.report.scores import Block
from fedtailor.report.significance import Pair, against


def summary_records(
    found: Sequence[Block], pairs: Sequence[Pair], all_measures: Mapping[str, Sequence[Block]]
) -> list[dict[str, Any]]:
    """``summary.json``: a record per (pool, budget, method), in fractions; null where there is no number.

    Records of generation runs have every measure's mean and SD under ``metrics``.
    """
    versus = against(pairs)
    records = []
    for block in found:
        for method in block.methods:
            cell, loss = block.average[method], block.loss.get(method)
            records.append({
                "pool": block.pool, "budget": block.budget, "method": method, "mean": cell.mean, "sd": cell.sd,
                "wins": block.wins[method],
                "n_languages": sum((language, method) in block.cells for language in block.languages),
                "versus_base": _comparison(versus.get((block.pool, block.budget, method))),
                "loss_mean": loss.mean if loss else None, "loss_sd": loss.sd if loss else None,
                **_metrics(block, method, all_measures),
            })  # fmt: skip
    return records


def _metrics(block: Block, method: str, all_measures: Mapping[str, Sequence[Block]]) -> dict[str, Any]:
    here = [other for other in all_measures.get(block.pool, ()) if other.budget == block.budget]
    if not here:
        return {}
    cells = {b.measure.name: b.average[method] for b in here if method in b.average}
    return {"metrics": {name: {"mean": cell.mean, "sd": cell.sd} for name, cell in cells.items()}}


def _comparison(pair: Pair | None) -> dict[str, Any] | None:
    if pair is None:
        return None
    return {
        "mean_difference": pair.difference, "standard_error": pair.standard_error,
        "ci95": pair.interval and list(pair.interval), "p": pair.p, "p_holm": pair.p_holm,
        "n_clients": pair.n_clients, "verdict": pair.verdict,
    }  # fmt: skip


def gaps(scored: pd.DataFrame) -> list[str]:
    """A sentence for each (pool, method, budget) that lacks clients or seeds which other methods have."""
    values, sentences = scored[scored["metric"] == primary(scored).name], []
    for pool in in_pool_order(values["pool"]):
        rows = values[values["pool"] == pool].drop_duplicates(["method", "budget", "seed", "client"])
        full = rows[["seed", "client"]].drop_duplicates()
        for method in in_method_order(rows["method"]):
            for budget, own in rows[rows["method"] == method].groupby("budget"):
                lost = len(full) - len(own)
                if lost:
                    at = "" if budget == -1 else f", r = {budget}"
                    sentences.append(
                        f"{pool_name(pool)}, {method_name(method)}{at}: {lost} of {len(full)} client results "
                        "are missing; its means are over the others."
                    )
    return sentences


def tied_shares(frame: pd.DataFrame) -> dict[tuple[str, int], float]:
    """(method, budget) to the share of ranks that tie with the last one kept, mean over clients and seeds."""
    rows = frame[(frame["stage"] == "personalise") & (frame["metric"] == "tied_at_threshold")]
    means = rows.groupby(["method", "budget"], as_index=False)["value"].mean()
    cells = zip(means["method"], means["budget"], means["value"], strict=True)
    return {(str(method), int(budget)): float(value) for method, budget, value in cells}
