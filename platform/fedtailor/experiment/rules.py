"""Rules between sections: combinations that cannot run, or would do something other than they say.

How the base is kept, what a model that spans several ranks (`engine.zero`) cannot do, privacy, attacks, cohorts; all
of it is said before anything is loaded. A rule is a function that yields one sentence per breach.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.errors import ConfigError, PlacementError
from fedtailor.experiment.config import ExperimentBase, cohort_size, method_of, method_section
from fedtailor.federated.method import Capability, Method
from fedtailor.lanes.loss import WHOLE_LOGITS
from fedtailor.methods import METHODS, build_method
from fedtailor.models.dimensions import model_config
from fedtailor.tasks.source import TaskKind

_QUANTISED = ("8bit", "4bit")
_FEWEST_MASKED = 3

ASKED: Mapping[TaskKind, str] = {
    "classification": "classes", "generation": "text", "regression": "numbers", "extraction": "spans of a text",
}  # fmt: skip
"""What tasks of a kind ask for, in messages."""


def task_problems(exp: ExperimentBase) -> Iterator[str]:
    """What methods and stages need and the task has not."""
    if not set(exp.personalise.pools) & set(exp.task.pools):
        asked, there = (", ".join(pools) for pools in (exp.personalise.pools, exp.task.pools))
        yield f"'personalise.pools' = [{asked}] leaves nobody, as 'task.pools' = [{there}] (allowed: [{there}])"
    if exp.task_entry.kind == "classification":
        return
    asked_for = ASKED[exp.task_entry.kind]
    able = [name for name in METHODS if Capability.CLASSES not in method_of(exp, name).requires]
    for name in exp.methods:
        if name not in able:
            yield _asks_for_classes(exp, name) or (
                f"'methods': {name} answers with classes, and task '{exp.task.name}' asks for {asked_for} "
                f"(allowed: {', '.join(able)})"
            )


def _asks_for_classes(exp: ExperimentBase, method: str) -> str | None:
    """What is wrong with the key without which a method would need no classes; None: there is no such key."""
    section = method_section(exp, method)
    for key, value in section:
        without = section.model_copy(update={key: getattr(type(section)(), key)})
        if Capability.CLASSES not in build_method(method, without, exp.r_max).requires:
            asks = f"and task '{exp.task.name}' asks for {ASKED[exp.task_entry.kind]}; leave the key out"
            return f"'{method}.{key}': {value} needs a classifier, {asks}"
    return None


def model_problems(exp: ExperimentBase) -> Iterator[str]:
    """What ``model.weights`` cannot be."""
    weights, engine, quantised = exp.model.weights, exp.engine, exp.model.weights in _QUANTISED
    if weights == "float32":
        return
    if engine.dtype != "bfloat16":
        yield (
            f"'model.weights': {weights} needs engine.dtype=bfloat16 (allowed with engine.dtype={engine.dtype}: "
            "float32)"
        )
    for name in exp.used_methods:
        if _trains_base(method_of(exp, name)):
            adapter = ", fedavg.adapter=lora" if name == "fedavg" else ""
            base = "" if name in exp.methods else ", base=none"
            yield (
                f"'model.weights': {weights} is for a frozen base, and {name} trains every weight (allowed: "
                f"float32{adapter}{base})"
            )
    if quantised and exp.task_entry.kind != "generation":
        yield (
            f"'model.weights': {weights} is for language models, and task '{exp.task.name}' asks for "
            f"{ASKED[exp.task_entry.kind]} (allowed: float32, bfloat16)"
        )
    if quantised and not (engine.num_gpus or engine.memory_gb):
        yield (
            f"'model.weights': {weights} needs a GPU: set engine.num_gpus or engine.memory_gb (allowed without: "
            "float32, bfloat16)"
        )
    if quantised and engine.zero.ranks > 1:
        yield (
            f"'model.weights': {weights} cannot be partitioned: engine.zero.ranks = {engine.zero.ranks} needs "
            "float32 or bfloat16"
        )


def _trains_base(method: Method) -> bool:
    return method.adapter is not None and method.adapter.trains_base


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


def server_problems(exp: ExperimentBase) -> Iterator[str]:
    """What the server may not do to methods that pool clients' rows, or that aggregate in a way of their own."""
    kinds = {"privacy": exp.privacy.name, "privacy.secure_aggregation": exp.privacy.secure_aggregation}
    private = [f"'{key}' = {value}" for key, value in kinds.items() if value != "none"]
    other = [f"'aggregation' = {exp.aggregation.name}"] if exp.aggregation.name != "method" else []
    for name in exp.used_methods:
        method = method_of(exp, name)
        if method.local_update is None:
            continue
        if method.pooled != "no" and private:
            yield f"'methods': {name} trains on the rows of all clients in one place, which {private[0]} is to prevent"
        why = "has clients of different ranks, whose updates its own aggregation pads and weighs"
        if method.ranks is None:
            pruned = not isinstance(method.aggregator, WeightedMean)
            why = "has clients that prune what they send, which its own aggregation leaves out" if pruned else ""
        if why and (private or other):
            yield (
                f"'methods': {name} {why}; {' and '.join([*private, *other])} cannot (allowed: aggregation=method "
                "without privacy)"
            )


def zero_problems(exp: ExperimentBase) -> Iterator[str]:
    """What a model that spans ranks cannot do."""
    engine, zero, asked = exp.engine, exp.engine.zero, f"'engine.zero.ranks' = {exp.engine.zero.ranks}"
    if zero.ranks == 1:
        return
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
    if zero.stage == 2:
        yield (
            "'engine.zero.stage' = 2 would partition gradients, whose buffer the backward pass of all adapters writes "
            "into and every rank needs whole (allowed: 1, 3)"
        )
    if zero.offload and zero.stage != 3:
        yield f"'engine.zero.offload' = true needs 'engine.zero.stage' = 3, not {zero.stage}"
    if zero.offload and not engine.num_gpus:
        yield "'engine.zero.offload' = true moves the base from GPUs to host memory, where it is without GPUs"
    if exp.model.base_dropout:
        yield (
            f"'model.base_dropout' = {exp.model.base_dropout:g}: the ranks of {asked} would draw the same masks for "
            "different rows (allowed: 0)"
        )
    for name in exp.used_methods:
        where = f"'base.name' = {name}" if name == exp.base.name else f"'methods': {name}"
        if problem := _needs_whole_base(method_of(exp, name), exp.task_entry.kind):
            yield f"{where} {problem}; use engine.zero.ranks=1 or another one"


def _needs_whole_base(method: Method, kind: TaskKind) -> str | None:
    """Why a method needs the whole base in one process."""
    if Capability.SECOND_ORDER in method.requires:
        return (
            "needs second derivatives (SECOND_ORDER), and a base that is partitioned over ranks is gone when the "
            "second backward pass comes (its form without them, e.g. fedl2p.hypergradient.terms=0, "
            "pf2lora.order=finite_difference or perfedavg_lora.order=hessian_free, works)"
        )
    if _trains_base(method):
        return "trains the base's own weights, of which a rank has only a part"
    if kind in ("classification", "extraction") and getattr(method.adapter, "head", False):
        return "trains the classification head's own weights, of which a rank has only a part"
    return None


def check_whole_logits(exp: ExperimentBase) -> None:
    """Refuses second derivatives of steps whose logits would be taken in pieces; reads the model's config.

    Raises:
        ConfigError: names the batch size, the number of logits and the ways out.
        ModelError: no config of the model is to be had.
    """
    if exp.task_entry.kind != "generation":
        return
    problems = []
    for name in exp.used_methods:
        if not (whole := method_of(exp, name).whole_rows):
            continue
        classes, length = model_config(exp.model, exp.task.max_length).vocab_size, exp.task.max_length
        rows, most = min(whole, exp.engine.micro_batch or whole), WHOLE_LOGITS // (length * classes)
        if rows > most:
            parts = f"engine.micro_batch={most}, " if most else "a smaller 'task.max_length', "
            problems.append(
                f"'{name}.batch_size' = {whole}: second derivatives need all logits of a client's step at once, and "
                f"those of {rows} rows of {length} tokens and {classes:,} classes are {rows * length * classes:,}; "
                f"above {WHOLE_LOGITS:,} they are taken in pieces, which have none. Use {parts}"
                f"or a form without them ({name}.order)"
            )
    if problems:
        raise ConfigError(problems)


def check_population(exp: ExperimentBase, seen: int) -> None:
    """Rules about the number of clients, for data that names them and is loaded now.

    Args:
        exp: checked configuration.
        seen: clients that cohorts are drawn from.

    Raises:
        ConfigError: a cohort that the seen pool cannot give, or that privacy cannot use.
    """
    if problems := list(population_problems(exp, seen)):
        raise ConfigError(problems)


def population_problems(exp: ExperimentBase, seen: int) -> Iterator[str]:
    """Cohorts that the seen pool cannot give, or that privacy or an attack cannot use; see `check_population`."""
    cohorts = {stage: cohort_size(getattr(exp, stage).cohort, seen) for stage in stages_with_rounds(exp)}
    for stage, cohort in cohorts.items():
        if cohort > seen:
            yield f"'{stage}.cohort': {cohort} clients asked, the seen pool has {seen} (allowed: 1 ... {seen})"
        if cohort < 1:
            yield f"'{stage}.cohort': {getattr(exp, stage).cohort} of {seen} seen clients is nobody"
    for name in exp.used_methods:
        if (ranks := method_of(exp, name).ranks) is not None and (problem := ranks.problem(seen)):
            yield f"'{name}.ranks': {problem}"
    if exp.privacy.name == "central_dp":
        yield from _dp_problems(exp, cohorts)
    if exp.privacy.secure_aggregation != "none":
        yield from _masking_problems(exp, cohorts)
    attack = exp.attack
    if attack.name != "none" and not cohorts:
        yield f"'attack' = {attack.name}: no stage of this run has rounds, so there is nobody to lie to"
    elif attack.share is not None and not round(attack.share * seen):
        yield f"'attack.share': {attack.share:g} of {seen} seen clients is nobody"


def stages_with_rounds(exp: ExperimentBase) -> list[str]:
    """``base`` and ``strategy``, those of them in which cohorts are drawn."""
    base = ["base"] if exp.base.name != "none" and exp.base.rounds else []
    trained = exp.strategy.rounds and any(method_of(exp, name).local_update for name in exp.methods)
    return [*base, *(["strategy"] if trained else [])]


def _dp_problems(exp: ExperimentBase, cohorts: Mapping[str, int]) -> Iterator[str]:
    how = exp.aggregation.name
    if how == "norm_bound":
        yield "privacy=central_dp bounds updates itself: set 'privacy.clip' and leave 'aggregation' alone"
    elif how != "method":
        yield f"privacy=central_dp adds noise to a mean of clipped updates; 'aggregation' = {how} is none (use method)"
    for name in exp.used_methods:
        if method_of(exp, name).early_stop is not None:
            yield (
                f"'{name}.patience': stopping early looks at train metrics that carry no noise, so epsilon would not "
                f"hold with privacy=central_dp (set {name}.patience=null)"
            )
    for stage, cohort in cohorts.items():
        if cohort == 1 and exp.privacy.noise_multiplier != 0:
            yield (
                f"'{stage}.cohort' is 1 client: noise hides a client in its cohort, so privacy=central_dp needs 2 or "
                "more"
            )
    if exp.privacy.target_epsilon is not None and not cohorts:
        yield "'privacy.target_epsilon': no stage of this run has rounds, so no noise can be found for it"


def _masking_problems(exp: ExperimentBase, cohorts: Mapping[str, int]) -> Iterator[str]:
    cfg, how, kind = exp.privacy, exp.aggregation.name, exp.privacy.secure_aggregation
    if how not in ("method", "norm_bound"):
        allowed = "method" if cfg.name == "central_dp" else "method, norm_bound"
        yield (
            f"'aggregation' = {how} compares single updates, which 'privacy.secure_aggregation' = {kind} hides from "
            f"the server (allowed: {allowed})"
        )
    if cfg.sampler == "poisson":
        yield (
            f"'privacy.secure_aggregation' = {kind} needs a cohort of known size, 'privacy.sampler' = poisson draws "
            "any (allowed: fixed)"
        )
    neighbours = cfg.secagg.neighbours
    for stage, cohort in cohorts.items():
        if cohort < _FEWEST_MASKED:
            yield (
                f"'{stage}.cohort' is {cohort}: in a sum of fewer than {_FEWEST_MASKED} one client knows the other's "
                f"update, so 'privacy.secure_aggregation' = {kind} hides nothing"
            )
        elif neighbours is not None and neighbours > cohort - 1:
            yield (
                f"'privacy.secagg.neighbours' = {neighbours}: a client of '{stage}' has {cohort - 1} others in its "
                f"cohort (allowed: 2 ... {cohort - 1})"
            )
