"""Whether a language model fits a worker, what to change if not, and how many ZeRO ranks it takes as a last resort."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch

from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.estimate import Estimate
from fedtailor.experiment.rules import model_problems, zero_problems
from fedtailor.experiment.stages import device_of

USABLE: Final = 0.9
"""Share of the memory that is planned with; the rest is for libraries, buffers and fragmentation."""

MOST_RANKS: Final = 64

_SHOWN: Final = (2, 4, 8)

Largest = Callable[[ExperimentBase], Estimate]
"""The estimate of the stage that needs the most memory under a configuration."""


@dataclass(frozen=True)
class Capacity:
    """Memory of one worker.

    Args:
        bytes: all of it.
        says: where the number is from.
    """

    bytes: int
    says: str


@dataclass(frozen=True)
class Option:
    """A number of ranks, and the largest stage on each.

    Args:
        ranks: 1: one worker.
        needs: of one rank.
        fits: within `USABLE` of the capacity.
    """

    ranks: int
    needs: Estimate
    fits: bool


@dataclass(frozen=True)
class Fit:
    """What fits where.

    Args:
        capacity: of one worker or rank.
        options: one worker, and groups under ZeRO stage 3 or as configured.
        advice: sentences.
    """

    capacity: Capacity
    options: tuple[Option, ...]
    advice: tuple[str, ...]


def capacity(exp: ExperimentBase, memory_gb: float | None = None) -> Capacity:
    """Memory of a worker: as told, else of ``engine.memory_gb``, else of the smallest GPU here, else RAM / actors.

    Args:
        exp: whole configuration.
        memory_gb: what to plan for, in GB.
    """
    engine = exp.engine
    if memory_gb is not None:
        return Capacity(round(memory_gb * 1e9), "--memory-gb")
    if engine.memory_gb is not None:
        return Capacity(round(engine.memory_gb * 1e9), "engine.memory_gb")
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    if sizes and device_of(exp) != "cpu":
        return Capacity(round(min(sizes) * min(1.0, engine.num_gpus)), f"engine.num_gpus={engine.num_gpus:g} here")
    workers = (engine.actors or 1) * engine.zero.ranks
    memory, says = psutil.virtual_memory().total, "memory of this machine"
    return Capacity(memory // workers, says if workers == 1 else f"{says} / {workers} workers")


def fit(exp: ExperimentBase, room: Capacity, largest: Largest) -> Fit:
    """Compares one worker with groups, and says what to change where one worker does not suffice.

    Args:
        exp: whole configuration.
        room: memory of a worker.
        largest: see `Largest`.
    """

    def option(ranks: int, of: ExperimentBase = exp) -> Option:
        stage = exp.engine.zero.stage if ranks == exp.engine.zero.ranks else 3
        needs = largest(_with(of, zero={"ranks": ranks, "stage": stage}))
        return Option(ranks, needs, needs.memory <= USABLE * room.bytes)

    own = exp.engine.zero.ranks
    options = tuple(option(ranks) for ranks in sorted({1, own, *_SHOWN}))
    return Fit(room, options, tuple(_advice(exp, option, {o.ranks: o for o in options})))


def _advice(exp: ExperimentBase, option: Callable[..., Option], known: Mapping[int, Option]) -> list[str]:
    own = exp.engine.zero.ranks
    if known[1].fits:
        wasted = f", so engine.zero.ranks={own} is not needed" if own > 1 else ""
        return [f"One worker suffices{wasted}."]
    if own > 1 and known[own].fits:
        return [f"One worker does not suffice; each of engine.zero.ranks={own} does.", *_under_zero(exp, own)]
    best = exp
    for words, changed in _savings(exp):
        best = changed
        if option(own, changed).fits:
            return [f"Does not fit as it is; fits with {words}."]
    fitting = next((n for n in range(2, MOST_RANKS + 1) if option(n).fits), None)
    if fitting is not None:
        return [f"One worker does not suffice: engine.zero.ranks={fitting} (stage 3) does.", *_under_zero(exp, fitting)]
    fitting, saved = next((n for n in range(2, MOST_RANKS + 1) if option(n, best).fits), None), _savings(exp)
    if fitting is not None and saved:
        words = f"{saved[-1][0]} engine.zero.ranks={fitting}"
        return [f"One worker does not suffice: {words} does.", *_under_zero(exp, fitting)]
    return [
        f"Does not fit, not with {MOST_RANKS} ranks either: what ranks cannot share is too large. Each budget of a run "
        "is a model of its own (budgets=[16] trains one at a time); a shorter task.max_length helps too."
    ]


def _savings(exp: ExperimentBase) -> list[tuple[str, ExperimentBase]]:
    """Settings that save memory on one worker, each on top of those before: how to write them, and the result."""
    steps: list[tuple[str, dict[str, Any]]] = []
    if exp.engine.micro_batch != 1:
        steps.append(("engine.micro_batch=1", {"engine": {"micro_batch": 1}}))
    if not exp.model.checkpointing:
        steps.append(("model.checkpointing=true", {"model": {"checkpointing": True}}))
    if exp.model.weights == "float32":
        half = {"model": {"weights": "bfloat16"}, "engine": {"dtype": "bfloat16"}}
        steps.append(("model.weights=bfloat16 engine.dtype=bfloat16", half))
    found, now, words = [], exp, ""
    for name, sections in steps:
        changed = _with(now, **sections)
        if model_problems(changed):
            continue
        now, words = changed, f"{words} {name}".strip()
        found.append((words, now))
    return found


def _with(exp: ExperimentBase, **sections: Mapping[str, Any]) -> ExperimentBase:
    """The configuration with some values changed; ``zero`` is the one of the engine."""
    engine, zero = exp.engine, sections.get("zero", {})
    engine = engine.model_copy(update={**sections.get("engine", {}), "zero": engine.zero.model_copy(update=dict(zero))})
    model = exp.model.model_copy(update=dict(sections.get("model", {})))
    return exp.model_copy(update={"engine": engine, "model": model})


def _under_zero(exp: ExperimentBase, ranks: int) -> list[str]:
    """What else would have to change for a group of so many ranks."""
    return [f"But {problem}." for problem in zero_problems(_with(exp, zero={"ranks": ranks, "stage": 3}))]
