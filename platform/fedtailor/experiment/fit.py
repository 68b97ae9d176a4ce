"""Whether the largest stage of a run fits a worker, or a group of ranks under ZeRO, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch

from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.estimate import Estimate
from fedtailor.experiment.rules import model_problems, zero_problems

_USABLE: Final = 0.9


@dataclass(frozen=True)
class Fit:
    """Whether the largest stage fits a worker, or a group under ZeRO.

    Args:
        capacity: bytes of one worker or rank.
        source: where that number is from.
        options: number of ranks (1: one worker) to the estimate of the largest stage on each; as configured, or at
            stage 3 of ZeRO.
        fits: number of ranks to whether each stays within the usable part of its memory.
        advice: what follows, in sentences.
        usable: part of the memory; the rest is for libraries, buffers and fragmentation.
    """

    capacity: int
    source: str
    options: Mapping[int, Estimate]
    fits: Mapping[int, bool]
    advice: tuple[str, ...]
    usable: float = _USABLE


def fit(exp: ExperimentBase, largest: Callable[[ExperimentBase], Estimate], memory_gb: float | None = None) -> Fit:
    """Compares one worker with groups, and names what would help where one worker does not suffice.

    Args:
        exp: whole configuration.
        largest: the estimate of the stage that needs the most memory under a configuration.
        memory_gb: memory of one worker to plan for; by default what is found here.
    """
    capacity, source = _capacity(exp, memory_gb)
    options = {ranks: largest(_under(exp, ranks)) for ranks in sorted({1, exp.engine.zero.ranks, 2, 4, 8})}
    fits = {ranks: needs.memory <= _USABLE * capacity for ranks, needs in options.items()}
    return Fit(capacity, source, options, fits, tuple(_advice(exp, fits)))


def _capacity(exp: ExperimentBase, memory_gb: float | None) -> tuple[int, str]:
    """Memory of a worker: as told, else of ``engine.memory_gb``, else of the smallest GPU here, else RAM / actors."""
    engine = exp.engine
    if memory_gb is not None:
        return round(memory_gb * 1e9), "--memory-gb"
    if engine.memory_gb is not None:
        return round(engine.memory_gb * 1e9), "engine.memory_gb"
    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    if sizes and exp.engine.device != "cpu":
        return round(min(sizes) * min(1.0, engine.num_gpus)), f"engine.num_gpus={engine.num_gpus:g} here"
    workers = (engine.actors or 1) * engine.zero.ranks
    memory, source = psutil.virtual_memory().total, "memory of this machine"
    return memory // workers, source if workers == 1 else f"{source} / {workers} workers"


def _under(exp: ExperimentBase, ranks: int) -> ExperimentBase:
    """The experiment on groups of so many ranks: as configured, or at stage 3."""
    own = exp.engine.zero
    return exp if ranks == own.ranks else _with(exp, "engine", zero=own.model_copy(update={"ranks": ranks, "stage": 3}))


def _with(exp: ExperimentBase, section: str, **changes: object) -> ExperimentBase:
    return exp.model_copy(update={section: getattr(exp, section).model_copy(update=changes)})


def _advice(exp: ExperimentBase, fits: Mapping[int, bool]) -> Iterator[str]:
    own = exp.engine.zero.ranks
    if fits[1]:
        yield f"One worker suffices{f', so engine.zero.ranks={own} is not needed' if own > 1 else ''}."
    elif fits[own]:
        yield f"One worker does not suffice; each of engine.zero.ranks={own} does."
    else:
        yield f"Does not fit as it is. Less memory is needed with {', '.join(_savings(exp))}."
        enough = next((ranks for ranks, fitting in fits.items() if fitting), None)
        if enough is None:
            yield f"Not even {max(fits)} ranks suffice without them: ranks do not share what an adapter needs."
            return
        yield f"engine.zero.ranks={enough} (stage 3) suffices without them."
        yield from (f"But {problem}." for problem in zero_problems(_under(exp, enough)))


def _savings(exp: ExperimentBase) -> Iterator[str]:
    """What the configuration could still do to save memory on one worker, in the order to try it."""
    if exp.engine.micro_batch != 1:
        yield "engine.micro_batch=1"
    if not exp.model.checkpointing:
        yield "model.checkpointing=true"
    # Whatever trains the base itself takes float32.
    if exp.model.weights == "float32" and not any(
        model_problems(_with(_with(exp, "model", weights="bfloat16"), "engine", dtype="bfloat16"))
    ):
        yield "model.weights=bfloat16 engine.dtype=bfloat16"
    if len(exp.budgets) > 1:
        yield "fewer budgets at a time (each is a model of its own)"
    yield "a shorter task.max_length"
