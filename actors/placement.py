"""How many actors fit, and what share of a GPU each gets; refused with the numbers where they do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fedtailor.core.errors import PlacementError, listed
from fedtailor.core.settings import EngineConfig

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Variables that pin the BLAS and OpenMP threads of a process."""

MAX_DEFAULT_ACTORS = 8
"""Actors on a machine without GPU where the configuration names no number."""

_STEP = 10_000  # Ray counts resources in steps of 1e-4.
_SHOWN_NODES = 8


@dataclass(frozen=True)
class NodeResources:
    """What one node (or one bundle of a placement group) offers in total.

    Args:
        name: host name or address, for messages.
        cpus: CPUs.
        gpus: GPUs; below 1 only in a bundle.
        gpu_memory_gb: memory of the node's smallest GPU in 1e9 bytes, None where it is not known.
    """

    name: str
    cpus: float
    gpus: float = 0.0
    gpu_memory_gb: float | None = None


@dataclass(frozen=True)
class ActorPlan:
    """Number and size of the actors.

    Args:
        count: actors.
        num_cpus: CPUs of each.
        num_gpus: GPUs of each, a multiple of 1e-4 below 1, or a whole number.
        memory_fraction: share of its GPU's memory that each may allocate; None for whole GPUs and CPU.
        capacity: actors of this size that fit at most.
        ranks: processes of this size that make up one actor, see `actors.zero_group`.
    """

    count: int
    num_cpus: float
    num_gpus: float
    memory_fraction: float | None
    capacity: int
    ranks: int = 1


def plan_actors(config: EngineConfig, nodes: Sequence[NodeResources], count: int | None = None) -> ActorPlan:
    """Computes the placement from plain numbers, without Ray.

    Args:
        config: ``num_cpus``, ``num_gpus`` or ``memory_gb``, ``actors`` and ``zero.ranks`` are read.
        nodes: everything that is alive.
        count: number of actors; default ``config.actors``, else one per GPU share, else one per CPU
            up to `MAX_DEFAULT_ACTORS`.

    Raises:
        PlacementError: it can never fit; names what is asked and what every node has.

    >>> plan_actors(EngineConfig(num_gpus=0.25), [NodeResources("a", cpus=16, gpus=2)]).count
    8
    """
    num_gpus, fraction = _gpu_share(config, nodes)
    slots, ranks = [_slots(node, config.num_cpus, num_gpus) for node in nodes], config.zero.ranks
    # Ranks of a group may be on several nodes.
    capacity = sum(slots) // ranks
    asked = count if count is not None else config.actors
    if asked is None:
        asked = max(1, capacity if num_gpus else min(max(1, MAX_DEFAULT_ACTORS // ranks), capacity))
    if asked > capacity:
        raise PlacementError(_refusal(config, nodes, slots, asked, num_gpus))
    return ActorPlan(asked, config.num_cpus, num_gpus, fraction, capacity, ranks)


def _gpu_share(config: EngineConfig, nodes: Sequence[NodeResources]) -> tuple[float, float | None]:
    """GPUs per actor, and the share of GPU memory to enforce."""
    if config.memory_gb is None:
        return config.num_gpus, config.num_gpus if 0 < config.num_gpus < 1 else None
    with_gpu = [node for node in nodes if node.gpus > 0]
    if not with_gpu:
        raise PlacementError(f"engine.memory_gb={config.memory_gb:g} needs a GPU: {_table(nodes)}")
    unknown = [node.name for node in with_gpu if node.gpu_memory_gb is None]
    if unknown:
        raise PlacementError(
            f"engine.memory_gb={config.memory_gb:g}: the GPU memory of {', '.join(unknown)} cannot be read; "
            "give engine.num_gpus instead"
        )
    # One fraction for all actors, so the smallest GPU decides: an actor may land on any of them.
    smallest = min(node.gpu_memory_gb or 0.0 for node in with_gpu)
    k = math.floor(smallest / config.memory_gb)
    if k < 1:
        raise PlacementError(f"engine.memory_gb={config.memory_gb:g} is more than a GPU has: {_table(with_gpu)}")
    return (1.0, None) if k == 1 else (math.floor(_STEP / k) / _STEP, 1 / k)


def _slots(node: NodeResources, num_cpus: float, num_gpus: float) -> int:
    """Actors that fit on a node; a fraction never spans two GPUs."""
    by_cpu = _times(node.cpus, num_cpus)
    if not num_gpus:
        return by_cpu
    if num_gpus >= 1:
        return min(by_cpu, _times(math.floor(node.gpus), num_gpus))
    whole = math.floor(node.gpus)
    return min(by_cpu, whole * _times(1.0, num_gpus) + _times(node.gpus - whole, num_gpus))


def _times(available: float, asked: float) -> int:
    return round(available * _STEP) // max(1, round(asked * _STEP))


def _refusal(
    config: EngineConfig, nodes: Sequence[NodeResources], slots: Sequence[int], asked: int, num_gpus: float
) -> str:
    gpu = f" and {num_gpus:g} GPU" if num_gpus else ""
    number = "the cohort (or use engine.mode=pool)" if config.mode == "per_client" else "engine.actors"
    keys = f"{number}, engine.num_cpus" + (", engine.num_gpus" if num_gpus else "")
    size, ranks = f"{config.num_cpus:g} CPU{gpu}", config.zero.ranks
    if ranks > 1:
        return (
            f"{asked} group(s) of engine.zero.ranks={ranks} processes of {size} each do not fit, at most {sum(slots)} "
            f"processes do: {_table(nodes, slots)}. Lower engine.zero.ranks, {keys}"
        )
    return f"{asked} actors of {size} each do not fit, at most {sum(slots)} do: {_table(nodes, slots)}. Lower {keys}"


def _table(nodes: Sequence[NodeResources], slots: Sequence[int] | None = None) -> str:
    if not nodes:
        return "no node is alive"
    lines = []
    for i, node in enumerate(nodes):
        memory = f" of {node.gpu_memory_gb:.1f} GB" if node.gpu_memory_gb else ""
        fits = f" ({slots[i]} fit)" if slots else ""
        lines.append(f"{node.name} has {node.cpus:g} CPU, {node.gpus:g} GPU{memory}{fits}")
    return listed(lines, _SHOWN_NODES, "; ")
