"""Rules between sections: combinations that cannot run, or would do something other than they say.

How the base is kept, what a model that spans several ranks (`engine.zero`) cannot do, privacy, attacks, cohorts; all
of it is said before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from fedtailor.core.errors import ConfigError, PlacementError
from fedtailor.experiment.config import ExperimentBase, cohort_size, method_section
from fedtailor.federated.method import Capability, Method
from fedtailor.methods import METHODS, build_method

_QUANTISED = ("8bit", "4bit")

_FEWEST_MASKED = 3


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
        f"'model.weights': {weights} is for a frozen base, and {name} trains every weight (allowed: {allowed})"
        for name, allowed in _whole_trainers(exp).items()
    ]
    if weights in _QUANTISED and exp.task_entry.kind != "generation":
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
    """Refuses quantised weights where nothing can make them. The GPUs themselves are `prepare.check_placement`'s.

    Raises:
        PlacementError: bitsandbytes is not installed.
    """
    if exp.model.weights in _QUANTISED and find_spec("bitsandbytes") is None:
        raise PlacementError(
            f"'model.weights' = {exp.model.weights} needs the package bitsandbytes, which is not installed: "
            "'pip install bitsandbytes', here and on all nodes, or use model.weights=bfloat16"
        )


def _whole_trainers(exp: ExperimentBase) -> dict[str, str]:
    """Base stage and methods whose clients train the model itself, with what is allowed in their place."""
    found = {}
    for name in dict.fromkeys([*([] if exp.base.name == "none" else [exp.base.name]), *exp.methods]):
        trained = build_method(name, method_section(exp, name), exp.r_max).adapter
        if trained and trained.trains_base:
            adapter = ", fedavg.adapter=lora" if name == "fedavg" else ""
            base = "" if name in exp.methods else ", base=none"
            found[name] = f"float32{adapter}{base}"
    return found


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
    if method.adapter is not None and method.adapter.trains_base:
        return "trains the base's own weights, of which a rank has only a part"
    if getattr(method.adapter, "head", False):
        return "trains the classification head's own weights, of which a rank has only a part"
    return None


def privacy_problems(exp: ExperimentBase, seen: int) -> list[str]:
    """One sentence per broken rule.

    Args:
        exp: whole configuration.
        seen: clients that cohorts are drawn from.
    """
    cfg, problems = exp.privacy, list[str]()
    stages = stages_with_rounds(exp)
    cohorts = {stage: cohort_size(getattr(exp, stage).cohort, seen) for stage in stages}
    if cfg.name == "central_dp":
        problems += _dp_problems(exp, cohorts)
    if cfg.secure_aggregation != "none":
        problems += _masking_problems(exp, cohorts)
    return problems


def attack_problems(exp: ExperimentBase, seen: int) -> list[str]:
    """One sentence per broken rule; arguments as in `privacy_problems`."""
    cfg = exp.attack
    if cfg.name == "none":
        return []
    if not stages_with_rounds(exp):
        return [f"'attack' = {cfg.name}: no stage of this run has rounds, so there is nobody to lie to"]
    if cfg.share is not None and not round(cfg.share * seen):
        return [f"'attack.share': {cfg.share:g} of {seen} seen clients is nobody"]
    return []


def _dp_problems(exp: ExperimentBase, cohorts: dict[str, int]) -> list[str]:
    problems, how = [], exp.aggregation.name
    if how == "norm_bound":
        problems.append("privacy=central_dp bounds updates itself: set 'privacy.clip' and leave 'aggregation' alone")
    elif how != "method":
        problems.append(
            f"privacy=central_dp adds noise to a mean of clipped updates; 'aggregation' = {how} is none (use method)"
        )
    problems += [
        f"'{name}.patience': stopping early looks at train metrics that carry no noise, so epsilon would not hold with "
        f"privacy=central_dp (set {name}.patience=null)"
        for name in _used(exp)
        if build_method(name, method_section(exp, name), exp.r_max).early_stop is not None
    ]
    if exp.privacy.noise_multiplier != 0:
        problems += [
            f"'{stage}.cohort' is 1 client: noise hides a client in its cohort, so privacy=central_dp needs 2 or more"
            for stage, cohort in cohorts.items()
            if cohort == 1
        ]
    if exp.privacy.target_epsilon is not None and not cohorts:
        problems.append("'privacy.target_epsilon': no stage of this run has rounds, so no noise can be found for it")
    return problems


def _masking_problems(exp: ExperimentBase, cohorts: dict[str, int]) -> list[str]:
    cfg, problems, how = exp.privacy, [], exp.aggregation.name
    kind = cfg.secure_aggregation
    allowed = "method" if cfg.name == "central_dp" else "method, norm_bound"
    if how not in ("method", "norm_bound"):
        problems.append(
            f"'aggregation' = {how} compares single updates, which 'privacy.secure_aggregation' = {kind} hides from "
            f"the server (allowed: {allowed})"
        )
    if cfg.sampler == "poisson":
        problems.append(
            f"'privacy.secure_aggregation' = {kind} needs a cohort of known size, 'privacy.sampler' = poisson draws "
            "any (allowed: fixed)"
        )
    for stage, cohort in cohorts.items():
        if cohort < _FEWEST_MASKED:
            problems.append(
                f"'{stage}.cohort' is {cohort}: in a sum of fewer than {_FEWEST_MASKED} one client knows the other's "
                f"update, so 'privacy.secure_aggregation' = {kind} hides nothing"
            )
        elif cfg.secagg.neighbours is not None and cfg.secagg.neighbours > cohort - 1:
            problems.append(
                f"'privacy.secagg.neighbours' = {cfg.secagg.neighbours}: a client of '{stage}' has {cohort - 1} others "
                f"in its cohort (allowed: 2 ... {cohort - 1})"
            )
    return problems


def _used(exp: ExperimentBase) -> list[str]:
    return list(dict.fromkeys([*([] if exp.base.name == "none" else [exp.base.name]), *exp.methods]))


def stages_with_rounds(exp: ExperimentBase) -> list[str]:
    """``base`` and ``strategy``, those of them in which cohorts are drawn."""
    trained = [build_method(name, method_section(exp, name), exp.r_max).local_update for name in exp.methods]
    base = ["base"] if exp.base.name != "none" and exp.base.rounds else []
    return base + (["strategy"] if any(trained) and exp.strategy.rounds else [])


def check_population(exp: ExperimentBase, seen: int) -> None:
    """Rules about the number of clients, for data that names them and is loaded now.

    Args:
        exp: checked configuration.
        seen: clients that cohorts are drawn from.

    Raises:
        ConfigError: a cohort that the seen pool cannot give, or that privacy cannot use.
    """
    if problems := population_problems(exp, seen):
        raise ConfigError(problems)


def population_problems(exp: ExperimentBase, seen: int) -> list[str]:
    """One sentence per cohort that the seen pool cannot give, or that privacy or an attack cannot use."""

    problems = []
    for name in stages_with_rounds(exp):
        cohort = cohort_size(getattr(exp, name).cohort, seen)
        if cohort > seen:
            problems.append(
                f"'{name}.cohort': {cohort} clients asked, the seen pool has {seen} (allowed: 1 ... {seen})"
            )
        if cohort < 1:
            problems.append(f"'{name}.cohort': {getattr(exp, name).cohort} of {seen} seen clients is nobody")
    return problems + privacy_problems(exp, seen) + attack_problems(exp, seen)


def task_problems(exp: ExperimentBase) -> list[str]:
    """What methods need and the task has not."""
    if exp.task_entry.kind != "generation":
        return []
    needs = {name: build_method(name, method_section(exp, name), exp.r_max).requires for name in METHODS}
    able = ", ".join(name for name in METHODS if Capability.CLASSES not in needs[name])
    return [
        f"'methods': {name} answers with classes, and task '{exp.task.name}' asks for text (allowed: {able})"
        for name in exp.methods
        if Capability.CLASSES in needs[name]
    ]
