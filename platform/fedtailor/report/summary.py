"""What a run amounts to: a record per pool, budget and method, what is missing, how many ranks tie, what it cost."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd

from fedtailor.report.names import in_method_order, in_pool_order, method_name, pool_name
from fedtailor.report.scores import Block, primary
from fedtailor.report.significance import Pair, against_base
from fedtailor.storage.round_store import TIMING_COLUMNS

COST_COLUMNS = (
    "stage", "seeds", "clients", "client_seconds", "wall_seconds", "clients_per_second", "seconds_per_client",
    "tokens_per_second", "mb_down", "mb_up", "peak_rss_mb", "peak_gpu_mb", "repeated",
)  # fmt: skip

COST_RULE = (
    "Clients: how often a client was trained or personalised. Client time: seconds that workers spent on clients, a "
    "group's time shared equally. Wall time: from a stage's start to its end, where the run saw both without a break; "
    "clients per second are over wall time. A stage that was reused from an earlier run took no time here."
)

LOAD_RULE = (
    "Training tokens: those that clients' training steps read, in every epoch and for every budget, without padding; 0 "
    "where nothing is trained; per second of wall time. Down and up: float32 bytes of common "
    "parameters that a real client would receive and send for one call; what it keeps to itself and the frozen base "
    "do not travel. Peak memory: the largest worker process so far, its model and libraries included. Repeated: "
    "clients whose call had been lost before."
)


def summary_records(
    found: Sequence[Block], pairs: Sequence[Pair], all_measures: Mapping[str, Sequence[Block]]
) -> list[dict[str, Any]]:
    """``summary.json``: a record per (pool, budget, method), in fractions; null where there is no number.

    Records of generation runs have every measure's mean and SD under ``metrics``.
    """
    versus = against_base(pairs)
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
    return None if pair is None else {
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


def tied_shares(frame: pd.DataFrame) -> list[tuple[str, int, float]]:
    """Method, budget, and the share of ranks that tie with the last one kept, mean over clients and seeds."""
    rows = frame[(frame["stage"] == "personalise") & (frame["metric"] == "tied_at_threshold")]
    means = rows.groupby(["method", "budget"], as_index=False)["value"].mean()
    return list(means[["method", "budget", "value"]].itertuples(index=False, name=None))


def cost_table(
    stages: Sequence[Mapping[str, Any]], times: pd.DataFrame, events: Sequence[Mapping[str, Any]]
) -> pd.DataFrame:
    """`COST_COLUMNS`, a row per stage (its seeds together) that has times, in the order of the run; NaN where unknown.

    1 MB is 1e6 bytes; ``mb_down`` and ``mb_up`` are means over calls of clients, the peaks are the largest process.

    Args:
        stages: of run.json, each with a key such as ``strategy/fedl2p/r8/seed42``.
        times: `TIMING_COLUMNS`, or of them stage, round, client and seconds only.
        events: lines of events.jsonl.
    """
    nan, walls, times = float("nan"), _walls(events), times.reindex(columns=list(TIMING_COLUMNS))
    keys = list(dict.fromkeys(str(stage["key"]) for stage in stages)) or list(dict.fromkeys(times["stage"]))
    rows = []
    for name in dict.fromkeys(map(_without_seed, keys)):
        timed = times[times["stage"].isin([key for key in keys if _without_seed(key) == name])]
        if timed.empty:
            continue
        # Rows of earlier versions do not say everything, and one of them makes a sum unknown.
        known = timed[["seconds", "tokens", "bytes_down", "bytes_up", "peak_rss", "peak_gpu", "attempt"]].astype(float)
        ran, n, seconds = sorted(set(timed["stage"])), len(timed), float(known["seconds"].sum())
        wall = sum(walls.get(key, nan) for key in ran)
        rows.append({
            "stage": name, "seeds": len(ran), "clients": n, "client_seconds": seconds, "wall_seconds": wall,
            "clients_per_second": n / (wall or nan), "seconds_per_client": seconds / n,
            "tokens_per_second": known["tokens"].sum(skipna=False) / (wall or nan),
            "mb_down": known["bytes_down"].mean() / 1e6, "mb_up": known["bytes_up"].mean() / 1e6,
            "peak_rss_mb": known["peak_rss"].max() / 1e6, "peak_gpu_mb": known["peak_gpu"].max() / 1e6,
            "repeated": float((known["attempt"] > 0).sum()) if known["attempt"].notna().any() else nan,
        })  # fmt: skip
    return pd.DataFrame(rows, columns=list(COST_COLUMNS))


def _without_seed(key: str) -> str:
    return re.sub(r"/seed\d+$", "", key)


def _walls(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Stage to seconds between its only start and its end; a stage that was taken up again is left out."""
    times: dict[tuple[str, Any], list[datetime]] = {}
    for event in events:
        if event.get("kind") == "stage":
            moment = datetime.fromisoformat(event["time"])
            times.setdefault((str(event["stage"]), event.get("state")), []).append(moment)
    return {
        stage: (times[stage, "done"][-1] - began[0]).total_seconds()
        for (stage, state), began in times.items()
        if state == "running" and len(began) == 1 and (stage, "done") in times
    }
