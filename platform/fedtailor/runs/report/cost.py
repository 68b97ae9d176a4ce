"""What a run cost: clients trained, seconds of worker and wall time per stage, over seeds. Never in a digest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import pandas as pd

COLUMNS = ("stage", "seeds", "clients", "client_seconds", "wall_seconds", "clients_per_second", "seconds_per_client")
RULE = (
    "Clients: how often a client was trained or personalised. Client time: seconds that workers spent on clients, a "
    "group's time shared equally. Wall time: from a stage's start to its end, where the run saw both without a break; "
    "clients per second are over wall time. A stage that was reused from an earlier run took no time here."
)


def cost(stages: Sequence[Mapping[str, Any]], times: pd.DataFrame, events: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """`COLUMNS`, a row per stage (its seeds together) that has times, in the order of the run; NaN where unknown.

    Args:
        stages: of run.json, each with a key such as ``strategy/fedl2p/r8/seed42``.
        times: stage, round, client, seconds.
        events: lines of events.jsonl.
    """
    walls = _walls(events)
    keys = list(dict.fromkeys(str(stage["key"]) for stage in stages)) or list(dict.fromkeys(times["stage"]))
    rows = []
    for name in dict.fromkeys(_without_seed(key) for key in keys):
        own = [key for key in keys if _without_seed(key) == name]
        timed = times[times["stage"].isin(own)]
        if not len(timed):
            continue
        ran = sorted(set(timed["stage"]))
        wall = sum(walls[key] for key in ran) if all(key in walls for key in ran) else float("nan")
        n, seconds = len(timed), float(timed["seconds"].sum())
        rows.append((name, len(ran), n, seconds, wall, n / wall if wall else float("nan"), seconds / n))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _without_seed(key: str) -> str:
    return re.sub(r"/seed\d+$", "", key)


def _walls(events: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Stage to seconds between its only start and its end; a stage that was taken up again is left out."""
    began: dict[str, list[str]] = {}
    ended: dict[str, str] = {}
    for event in events:
        if event.get("kind") == "stage" and event.get("state") in ("running", "done"):
            key, time = str(event["stage"]), str(event["time"])
            if event["state"] == "running":
                began.setdefault(key, []).append(time)
            else:
                ended[key] = time
    return {
        key: (datetime.fromisoformat(ended[key]) - datetime.fromisoformat(times[0])).total_seconds()
        for key, times in began.items()
        if len(times) == 1 and key in ended
    }
