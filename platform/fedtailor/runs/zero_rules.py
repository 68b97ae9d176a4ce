"""What a model that spans several ranks (`engine.zero`) cannot do, said before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator

from fedtailor.adapters.full import FullModel
from fedtailor.core.method import Capability, Method
from fedtailor.methods import build_method
from fedtailor.runs.experiment import ExperimentBase, method_section


def zero_problems(exp: ExperimentBase) -> list[str]:
    """One sentence per broken rule."""
    if exp.engine.zero.ranks == 1:
        return []
    return [*_engine_problems(exp), *_model_problems(exp), *_method_problems(exp)]


def _engine_problems(exp: ExperimentBase) -> Iterator[str]:
    engine, asked = exp.engine, f"'engine.zero.ranks' = {exp.engine.zero.ranks}"
    if engine.backend != "ray":
        yield f"{asked} starts a process per rank, 'engine.backend' = {engine.backend} has one (allowed: ray)"
    if engine.memory_gb is not None:
        yield (
            f"{asked} needs a whole GPU per rank, 'engine.memory_gb' = {engine.memory_gb:g} shares GPUs "
            "(allowed: engine.num_gpus=1, or 0 for CPUs)"
        )
    if engine.num_gpus not in (0, 1):
        yield (
            f"{asked} needs a whole GPU per rank, which NCCL shares with nobody; 'engine.num_gpus' = "
            f"{engine.num_gpus:g} (allowed: 1, or 0 for CPUs)"
        )
    if engine.zero.stage == 2:
        yield (
            "'engine.zero.stage' = 2 would partition gradients, whose buffer the backward pass of all adapters writes "
            "into and every rank needs whole (allowed: 1, 3)"
        )
    if engine.zero.offload and engine.zero.stage != 3:
        yield f"'engine.zero.offload' = true needs 'engine.zero.stage' = 3, not {engine.zero.stage}"
    if engine.zero.offload and not engine.num_gpus:
        yield "'engine.zero.offload' = true moves the base from GPUs to host memory, where it is without GPUs"


def _model_problems(exp: ExperimentBase) -> Iterator[str]:
    if exp.model.base_dropout:
        yield (
            f"'model.base_dropout' = {exp.model.base_dropout:g}: the ranks of 'engine.zero.ranks' = "
            f"{exp.engine.zero.ranks} would draw the same masks for different rows (allowed: 0)"
        )


def _method_problems(exp: ExperimentBase) -> Iterator[str]:
    names = {name: f"'methods': {name}" for name in exp.methods}
    if exp.base.name != "none":
        names[exp.base.name] = f"'base.name' = {exp.base.name}"
    for name, where in names.items():
        problem = _reason(build_method(name, method_section(exp, name), exp.r_max))
        if problem:
            yield f"{where} {problem}; use engine.zero.ranks=1 or another one"


def _reason(method: Method) -> str | None:
    """Why a method needs the whole base in one process."""
    if Capability.SECOND_ORDER in method.requires:
        return (
            "needs second derivatives (SECOND_ORDER), and a base that is partitioned over ranks is gone when the "
            "second backward pass comes (its first-order form, e.g. fedl2p.hypergradient.terms=0, works)"
        )
    if isinstance(method.adapter, FullModel):
        return "trains the base's own weights, of which a rank has only a part"
    if getattr(method.adapter, "head", False):
        return "trains the classification head's own weights, of which a rank has only a part"
    return None
