"""Sentences on how a run was set up: its base, its size, what the model and the data were before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from fedtailor.experiment.config import scaled
from fedtailor.report.names import in_method_order, in_pool_order, method_name, pool_name
from fedtailor.report.wording import NOT_RECORDED, at, counted, rounds, spread, text

BASES: Mapping[str, str] = {
    "fedavg": "standard FL (FedAvg)", "feddpa": "FedDPA-T", "dept": "DEPT (SPEC)", "none": "off the shelf",
}  # fmt: skip
"""How a caption calls a base method."""


def base_line(run: Mapping[str, Any], frame: pd.DataFrame | None = None) -> str:
    """``standard FL (FedAvg), 15 rounds, one base of seed 42 for all seeds``."""
    config = run.get("config") or {}
    name = text(at(config, "base.name"))
    if name == "none":
        return BASES[name]
    planned = _planned(run, "base")
    done = _done(frame, "base")
    number = rounds(planned) if planned == NOT_RECORDED else _partly(planned, done)
    seed = at(config, "base.seed")
    shared = "" if seed is None else f", one base of seed {seed} for all seeds"
    return f"{BASES.get(name, name)}, {number}{shared}"


def strategy_line(run: Mapping[str, Any], frame: pd.DataFrame | None = None) -> str:
    """``150 rounds``, and the methods that ended earlier: ``150 rounds (FedL2P: 61 to 88)``."""
    planned = _planned(run, "strategy")
    done = {} if frame is None else {m: _done(frame, "strategy", m) for m in _methods(frame, "strategy")}
    early = [f"{method_name(m)}: {spread(n)}" for m, n in done.items() if [str(k) for k in set(n)] != [planned]]
    return rounds(planned) + (f" ({', '.join(early)})" if early and planned != NOT_RECORDED else "")


def scale_sentence(run: Mapping[str, Any]) -> str:
    """How much smaller than configured the run is; empty at scale 1.

    >>> task, rounds = {"clients_per_language": 20}, {"rounds": 150}
    >>> scale_sentence({"config": {"scale": 0.1, "task": task, "base": {"name": "none"}, "strategy": rounds}})
    'Scale 0.1: 2 of 20 clients per language and pool, 15 of 150 strategy rounds.'
    """
    config = run.get("config") or {}
    scale = at(config, "scale")
    if scale is None or scale == 1:
        return ""
    parts = []
    full = at(config, "task.clients_per_language")
    if isinstance(full, int):
        kept = at(config, "task.clients_kept") or scaled(full, float(scale))
        parts.append(f"{kept} of {full} clients per language and pool")
    for section in ("base", "strategy"):
        number = at(config, f"{section}.rounds")
        if isinstance(number, int) and at(config, f"{section}.name") != "none":
            parts.append(f"{scaled(number, float(scale))} of {number} {section} rounds")
    return f"Scale {scale:g}: {', '.join(parts)}." if parts else f"Scale {scale:g}."


def pretrain_sentence(record: Mapping[str, Any] | None) -> str:
    """What the model was pretrained on, from its ``pretrain.json``; empty where it does not say.

    >>> options = {"tasks": ["cldr"], "steps": 2000}
    >>> pretrain_sentence({"options": options, "tokens_read": 8192000, "final": {"held_out_loss": 3.2149}})
    'The model was pretrained on train texts of cldr, both pools (2,000 steps, 8,192,000 tokens, held-out loss 3.21).'
    """
    if not record:
        return ""
    tasks, loss = at(record, "options.tasks"), at(record, "final.held_out_loss")
    sizes = {"steps": at(record, "options.steps"), "tokens": record.get("tokens_read")}
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
        parts += [f"{counted(n, 'text')} {'is' if n == 1 else 'are'} in {words}"] if n else []
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
            f"{spread(counts)} of {total} {pool_name(pool).lower()} were never sampled for the base and have its "
            "initial private state."
        )
    return sentences


def _planned(run: Mapping[str, Any], kind: str) -> str:
    stages: Sequence[Any] = run.get("stages") or ()
    numbers = {s["rounds"] for s in stages if isinstance(s, Mapping) and s.get("kind") == kind and "rounds" in s}
    if numbers:
        return spread(numbers)
    number, scale = at(run.get("config"), f"{kind}.rounds"), at(run.get("config"), "scale")
    return text(scaled(number, float(scale)) if isinstance(number, int) and scale else number)


def _done(frame: pd.DataFrame | None, stage: str, method: str | None = None) -> list[int]:
    """Rounds that each seed (and budget) of a stage has gone through."""
    if frame is None:
        return []
    rows = frame[(frame["stage"] == stage) & ((frame["method"] == method) | (method is None))]
    return [int(n) for n in rows.groupby(["method", "seed", "budget"])["round"].max() + 1]


def _methods(frame: pd.DataFrame, stage: str) -> tuple[str, ...]:
    return in_method_order(frame.loc[frame["stage"] == stage, "method"])


def _partly(planned: str, done: Sequence[int]) -> str:
    if not done or {str(n) for n in done} == {planned}:
        return rounds(planned)
    return f"{spread(done)} of {rounds(planned)}"
