"""Whether a language model fits a worker, or a group under ZeRO; the keys that would help if not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import psutil  # type: ignore[import-untyped,unused-ignore]
import torch

from fedtailor.core.settings import ZeroConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.estimate import Estimate
from fedtailor.experiment.rules import model_problems, zero_problems
from fedtailor.experiment.stages import device_of

USABLE: Final = 0.9
"""Share of the memory that is planned with; the rest is for libraries, buffers and fragmentation."""

_SHOWN: Final = (2, 4, 8)


def _may_be_bfloat16(exp: ExperimentBase) -> bool:
    """Whether the base is in float32, and nothing trains the base itself, which takes float32."""
    model = exp.model.model_copy(update={"weights": "bfloat16"})
    engine = exp.engine.model_copy(update={"dtype": "bfloat16"})
    return exp.model.weights == "float32" and not model_problems(
        exp.model_copy(update={"model": model, "engine": engine})
    )


_SAVINGS: Final[Mapping[str, Callable[[ExperimentBase], bool]]] = {
    "engine.micro_batch=1": lambda exp: exp.engine.micro_batch != 1,
    "model.checkpointing=true": lambda exp: not exp.model.checkpointing,
    "model.weights=bfloat16 engine.dtype=bfloat16": _may_be_bfloat16,
    "fewer budgets at a time (each is a model of its own)": lambda exp: len(exp.budgets) > 1,
    "a shorter task.max_length": lambda exp: True,
}
"""What saves memory on one worker, in the order to try it, and whether a configuration has not done so yet."""

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
    """Compares one worker with groups, and names what would help where one worker does not suffice.

    Args:
        exp: whole configuration.
        room: memory of a worker.
        largest: see `Largest`.
    """
    own = exp.engine.zero
    options = []
    for ranks in sorted({1, own.ranks, *_SHOWN}):
        zero = own.model_copy(update={"ranks": ranks, "stage": own.stage if ranks == own.ranks else 3})
        needs = largest(_under(exp, zero))
        options.append(Option(ranks, needs, needs.memory <= USABLE * room.bytes))
    return Fit(room, tuple(options), tuple(_advice(exp, options)))


def _advice(exp: ExperimentBase, options: Sequence[Option]) -> list[str]:
    own, fits = exp.engine.zero.ranks, {option.ranks: option.fits for option in options}
    if fits[1]:
        needless = f", so engine.zero.ranks={own} is not needed" if own > 1 else ""
        return [f"One worker suffices{needless}."]
    if fits[own]:
        return [f"One worker does not suffice; each of engine.zero.ranks={own} does.", *_under_zero(exp, own)]
    helpful = [key for key, open_to in _SAVINGS.items() if open_to(exp)]
    advice = [f"Does not fit as it is. Less memory is needed with {', '.join(helpful)}."]
    ranks = next((ranks for ranks, enough in fits.items() if enough), None)
    if ranks is not None:
        return [*advice, f"engine.zero.ranks={ranks} (stage 3) suffices without them.", *_under_zero(exp, ranks)]
    return [*advice, f"Not even {max(fits)} ranks suffice without them: ranks do not share what an adapter needs."]


def _under(exp: ExperimentBase, zero: ZeroConfig) -> ExperimentBase:
    return exp.model_copy(update={"engine": exp.engine.model_copy(update={"zero": zero})})


def _under_zero(exp: ExperimentBase, ranks: int) -> list[str]:
    """What else would have to change for a group of so many ranks."""
    group = exp.engine.zero.model_copy(update={"ranks": ranks, "stage": 3})
    return [f"But {problem}." for problem in zero_problems(_under(exp, group))]
