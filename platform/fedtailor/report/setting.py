"""Sentences on how a run was set up: its base, its size, what the model and the data were before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fedtailor.experiment.config import ExperimentBase, clients_per_language, scaled
from fedtailor.report.names import in_method_order, in_pool_order, method_name, pool_name
from fedtailor.report.wording import format_range, plural

OFF_THE_SHELF = "off the shelf"
"""How a caption calls a base that no federated training has changed."""


def base_line(exp: ExperimentBase, frame: pd.DataFrame) -> str:
    """``FedAvg, 15 rounds, one base of seed 42 for all seeds``."""
    base = exp.base
    if base.name == "none":
        return OFF_THE_SHELF
    planned, done = scaled(base.rounds, exp.scale), _done(frame, "base")
    partly = f"{format_range(done)} of " if set(done) - {planned} else ""
    shared = "" if base.seed is None else f", one base of seed {base.seed} for all seeds"
    return f"{method_name(base.name)}, {partly}{plural(planned, 'round')}{shared}"


def strategy_line(exp: ExperimentBase, frame: pd.DataFrame) -> str:
    """``150 rounds``, and the methods that ended earlier: ``150 rounds (FedL2P: 61 to 88)``."""
    planned = scaled(exp.strategy.rounds, exp.scale)
    methods = in_method_order(frame.loc[frame["stage"] == "strategy", "method"])
    done = {method: _done(frame, "strategy", method) for method in methods}
    early = [f"{method_name(m)}: {format_range(n)}" for m, n in done.items() if set(n) != {planned}]
    return plural(planned, "round") + (f" ({', '.join(early)})" if early else "")


def scale_sentence(exp: ExperimentBase) -> str:
    """How much smaller than configured the run is; empty at scale 1.

    >>> from fedtailor.experiment.config import Experiment
    >>> scale_sentence(Experiment(scale=0.1, base={"name": "none"}))
    'Scale 0.1: 1 of 10 clients per language and pool, 15 of 150 strategy rounds.'
    """
    if exp.scale == 1:
        return ""
    parts = [f"{clients_per_language(exp)} of {exp.task.clients_per_language} clients per language and pool"]
    for name in ("strategy",) if exp.base.name == "none" else ("base", "strategy"):
        full = getattr(exp, name).rounds
        parts.append(f"{scaled(full, exp.scale)} of {full} {name} rounds")
    return f"Scale {exp.scale:g}: {', '.join(parts)}."


def pretrain_sentence(record: Mapping[str, Any] | None) -> str:
    """What the model was pretrained on, from its ``pretrain.json``; empty where it does not say.

    >>> options = {"tasks": ["cldr"], "steps": 2000}
    >>> pretrain_sentence({"options": options, "tokens_read": 8192000, "final": {"held_out_loss": 3.2149}})
    'The model was pretrained on train texts of cldr, both pools (2,000 steps, 8,192,000 tokens, held-out loss 3.21).'
    """
    if not record:
        return ""
    options = record.get("options", {})
    tasks, loss = options.get("tasks"), record.get("final", {}).get("held_out_loss")
    sizes = {"steps": options.get("steps"), "tokens": record.get("tokens_read")}
    parts = [f"{n:,} {name}" for name, n in sizes.items() if isinstance(n, int)]
    parts += [f"held-out loss {loss:.2f}"] if isinstance(loss, int | float) else []
    where = f" on train texts of {', '.join(map(str, tasks))}, both pools" if tasks else ""
    size = f" ({', '.join(parts)})" if parts else ""
    return f"The model was pretrained{where}{size}."


def duplicates_sentence(notes: Mapping[str, Any]) -> str:
    """What the data say about repeated texts; empty where they say nothing.

    >>> duplicates_sentence({"found_duplicates": 12, "dropped_duplicates": 0, "leak_seen_unseen": 5})
    'Repeated texts: 12 test texts are also train texts, none dropped; 5 texts are in both pools.'
    """
    found, parts = notes.get("found_duplicates"), []
    if found:
        dropped = notes.get("dropped_duplicates") or 0
        words = {0: "none dropped", found: "all dropped"}.get(dropped, f"{dropped} dropped")
        parts.append(f"{found} test texts are also train texts, {words}")
    leaks = {key: n for key, n in notes.items() if key.startswith("leak_")}
    for key, n in leaks.items():
        where = key.removeprefix("leak_").removesuffix("_train_test")
        words = "both pools" if key == "leak_seen_unseen" else f"train and test of the {where} pool"
        parts += [f"{plural(n, 'text')} {'is' if n == 1 else 'are'} in {words}"] if n else []
    if parts:
        return f"Repeated texts: {'; '.join(parts)}."
    return "No text is in two pools, or in train and test." if leaks or found == 0 else ""


def fallback_sentences(frame: pd.DataFrame) -> dict[str, str]:
    """Pool to how many clients were given the initial private state of the base, where any were."""
    tested = frame[frame["stage"] == "personalise"]
    initial = tested[(tested["metric"] == "initial_overlay") & (tested["value"] > 0)]
    sentences = {}
    for pool in in_pool_order(initial["pool"]):
        counts = initial[initial["pool"] == pool].groupby("seed")["client"].nunique()
        total = tested.loc[tested["pool"] == pool, "client"].nunique()
        sentences[pool] = (
            f"{format_range(counts)} of {total} {pool_name(pool).lower()} were never sampled for the base and have its "
            "initial private state."
        )
    return sentences


def _done(frame: pd.DataFrame, stage: str, method: str | None = None) -> list[int]:
    """Rounds that each seed (and budget) of a stage has gone through."""
    rows = frame[(frame["stage"] == stage) & ((frame["method"] == method) | (method is None))]
    return [int(n) for n in rows.groupby(["method", "seed", "budget"])["round"].max() + 1]
