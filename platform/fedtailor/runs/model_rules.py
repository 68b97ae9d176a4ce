"""How the base is kept: combinations that cannot run, and what a machine must have for them."""

from __future__ import annotations

from importlib.util import find_spec

from fedtailor.adapters.full import FullModel
from fedtailor.core.errors import PlacementError
from fedtailor.methods import build_method
from fedtailor.runs.experiment import ExperimentBase, method_section

_QUANTISED = ("8bit", "4bit")


def model_problems(exp: ExperimentBase) -> list[str]:
    """One sentence per broken rule about ``model.weights``."""
    weights, problems = exp.model.weights, list[str]()
    if weights == "float32":
        return problems
    if exp.engine.dtype != "bfloat16":
        problems.append(
            f"'model.weights': {weights} needs engine.dtype=bfloat16 (allowed with engine.dtype={exp.engine.dtype}: "
            "float32)"
        )
    problems += [
        f"'model.weights': {weights} is for a frozen base, and {name} trains every weight (allowed: float32, or "
        f"{'fedavg.adapter=lora or ' if name == 'fedavg' else ''}base=none)"
        for name in _whole_trainers(exp)
    ]
    if weights in _QUANTISED and exp.task.kind != "generation":
        problems.append(
            f"'model.weights': {weights} is for language models, and task '{exp.task.name}' asks for classes (allowed: "
            "float32, bfloat16)"
        )
    if weights in _QUANTISED and not (exp.engine.num_gpus or exp.engine.memory_gb):
        problems.append(
            f"'model.weights': {weights} needs a GPU: set engine.num_gpus or engine.memory_gb (allowed without: "
            "float32, bfloat16)"
        )
    if weights in _QUANTISED and exp.engine.zero.ranks > 1:
        problems.append(
            f"'model.weights': {weights} cannot be partitioned: engine.zero.ranks = {exp.engine.zero.ranks} needs "
            "float32 or bfloat16"
        )
    return problems


def check_weights(exp: ExperimentBase) -> None:
    """Refuses quantised weights where nothing can make them. The GPUs themselves are `preflight.check_placement`'s.

    Raises:
        PlacementError: bitsandbytes is not installed.
    """
    if exp.model.weights in _QUANTISED and find_spec("bitsandbytes") is None:
        raise PlacementError(
            f"'model.weights' = {exp.model.weights} needs the package bitsandbytes, which is not installed: "
            "'pip install bitsandbytes', here and on all nodes, or use model.weights=bfloat16"
        )


def _whole_trainers(exp: ExperimentBase) -> list[str]:
    """Base stage and methods whose clients train the model itself."""
    names = dict.fromkeys([*([] if exp.base.name == "none" else [exp.base.name]), *exp.methods])
    built = {name: build_method(name, method_section(exp, name), exp.r_max) for name in names}
    return [name for name, method in built.items() if isinstance(method.adapter, FullModel)]
