"""Plan of an experiment from sizes alone: stages, bytes, memory, work. No weights are read or made.

How long clients took comes from earlier runs of the same task and model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from huggingface_hub import try_to_load_from_cache

from fedtailor.core.errors import DataError, ModelError
from fedtailor.core.scope import Scope
from fedtailor.experiment.config import ExperimentBase, base_seed, clients_per_language, method_section, scaled_task
from fedtailor.experiment.estimate import Estimate, Population, estimate
from fedtailor.experiment.fit import Fit, capacity, fit
from fedtailor.experiment.inputs import model_artifact, tokens_artifact
from fedtailor.experiment.stages import Inputs, Stage, plan_stages
from fedtailor.federated.attack import attack_of
from fedtailor.federated.method import Method
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.models.dimensions import ModelDimensions, dimensions, meta_model
from fedtailor.models.families import adapted_linears
from fedtailor.models.source import resolve
from fedtailor.storage.digest import DONE
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder, run_ids
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare

LOOKED_AT = 20
"""Newest runs whose times are looked at."""


@dataclass(frozen=True)
class Generator:
    """An auxiliary network that a method trains, e.g. FedP2EFT's PSG.

    Args:
        widths: of its layers, input first.
        parameters: all of them.
    """

    widths: tuple[int, ...]
    parameters: int


@dataclass(frozen=True)
class MethodSizes:
    """Numbers that a method trains: SHARED ones travel, the others stay where they are."""

    shared: int
    private: int
    ephemeral: int
    generators: tuple[Generator, ...]

    @property
    def numbers(self) -> tuple[int, int]:
        """SHARED ones, and the others."""
        return self.shared, self.private + self.ephemeral


@dataclass(frozen=True)
class StagePlan:
    """One stage, and what is known of it before it runs.

    Args:
        stage: as `plan_stages` gives it; its artifact name is invented where ``there`` is None.
        there: whether its artifact is complete; None: cannot be known without the weights.
        estimate: work, bytes and memory.
    """

    stage: Stage
    there: bool | None
    estimate: Estimate


@dataclass(frozen=True)
class Plan:
    """All that `plan_view` shows; ``fit`` for language models only."""

    exp: ExperimentBase
    model: ModelDimensions
    sizes: Mapping[str, MethodSizes]
    population: Population
    stages: Sequence[StagePlan]
    notes: Sequence[str]
    fit: Fit | None = None


def make_plan(exp: ExperimentBase, memory_gb: float | None = None) -> Plan:
    """Computes the plan of a checked configuration.

    Args:
        exp: whole configuration.
        memory_gb: memory of one worker to plan for; by default what is found here.

    Raises:
        ConfigError: ``attack.clients`` names somebody whom the data does not have.
        DataError: ``task.path`` is given and unusable.
        ModelError: no config of the model is to be had.
    """
    notes: list[str] = []
    data = {seed: _data(exp, seed, notes) for seed in dict.fromkeys(base_seed(exp, seed) for seed in exp.seeds)}
    found = {seed: data[base_seed(exp, seed)] for seed in exp.seeds}
    population = _population(exp, next(iter(found.values())), notes)
    dims = dimensions(exp.model, population.classes, exp.task.max_length, exp.task_entry.kind)

    @cache
    def sized(name: str, r_max: int) -> tuple[Method, MethodSizes]:
        method = build_method(name, method_section(exp, name), r_max)
        return method, method_sizes(exp, method, population.classes)

    def work_of(stage: Stage, other: ExperimentBase = exp) -> Estimate:
        method, size = sized(stage.method, stage.r_max)
        return estimate(other, stage, method, size.numbers, dims, population)

    stages: list[StagePlan] = []
    storage = Storage(exp.storage)
    for seed, inputs in found.items():
        known = inputs is not None and inputs[1] is not None
        names = inputs[1] if inputs and inputs[1] else Inputs("data", "model", "tokens")
        for stage in plan_stages(exp, seed, names, population.seen):
            there = storage.exists(f"artifacts/{stage.artifact}/{DONE}") if known else None
            if all(known_stage.stage.key != stage.key for known_stage in stages):
                stages.append(StagePlan(stage, there, work_of(stage)))
    fitting = None
    if exp.task_entry.kind == "generation":

        def largest(other: ExperimentBase) -> Estimate:
            return max((work_of(row.stage, other) for row in stages), key=lambda work: work.memory)

        fitting = fit(exp, capacity(exp, memory_gb), largest)
    sizes = {name: sized(name, exp.r_max)[1] for name in _used(exp)}
    return Plan(exp, dims, sizes, population, stages, list(dict.fromkeys(notes)), fitting)


def method_sizes(exp: ExperimentBase, method: Method, classes: int) -> MethodSizes:
    """Sums a method's declared parameters by owner, on a model without weights."""
    model = meta_model(exp.model, classes, exp.task.max_length, exp.task_entry.kind)
    own_layers = method.name == exp.base.name
    net = LaneNet(model, adapted_linears(model, "all-linear" if own_layers else exp.model.targets))
    parts = [*([method.adapter] if method.adapter else []), *method.modules]
    specs = [spec for part in parts for spec in part.specs(net)]
    total = {scope: sum(spec.size for spec in specs if spec.scope is scope) for scope in Scope}
    generators = []
    for module in method.modules:
        own = module.specs(net)
        layers = [spec.shape for spec in own if len(spec.shape) == 2]
        widths = (layers[0][1], *(out for out, _ in layers)) if layers else ()
        generators.append(Generator(widths, sum(spec.size for spec in own)))
    return MethodSizes(total[Scope.SHARED], total[Scope.PRIVATE], total[Scope.EPHEMERAL], tuple(generators))


def _used(exp: ExperimentBase) -> list[str]:
    names = [*([] if exp.base.name == "none" else [exp.base.name]), *exp.methods]
    return list(dict.fromkeys(names))


def _data(exp: ExperimentBase, seed: int, notes: list[str]) -> tuple[Population, Inputs | None] | None:
    """Client sizes of a seed, and the names of its inputs if they can be known; None without data."""
    if not (exp.task.path or os.environ.get("FEDTAILOR_DATA") or exp.task_entry.embedded):
        notes.append("The data is not here (task.path, FEDTAILOR_DATA): client sizes are unknown.")
        return None
    with TemporaryDirectory(prefix="fedtailor-plan-") as folder:
        try:
            data = prepare(scaled_task(exp), seed, Path(folder) / "data")
        except DataError as error:
            if exp.task.path:
                raise
            notes.append(f"Client sizes are unknown: {error}")
            return None
        attack_of(exp.attack, [client.id for client in data.pool("seen")])
        return _sizes(data), _inputs(exp, seed, data, notes)


def _inputs(exp: ExperimentBase, seed: int, data: TaskData, notes: list[str]) -> Inputs | None:
    source = resolve(exp.model)
    cached = source.kind != "hub" or isinstance(
        try_to_load_from_cache(source.location, "config.json", revision=source.revision), str
    )
    try:
        if not cached:
            raise ModelError(f"{source.location} is not in the local cache")
        name, model = f"data-{data.hash[:16]}", model_artifact(exp, seed, data)
    except ModelError as error:
        notes.append(f"Artifact names depend on the model's weights, which are not here: {error}.")
        return None
    return Inputs(name, model, tokens_artifact(exp, name, model))


def _sizes(data: TaskData) -> Population:
    seen, unseen = data.pool("seen"), data.pool("unseen")
    trains = sorted(client.n_train for client in data.clients)
    return Population(
        seen=len(seen),
        unseen=len(unseen),
        classes=len(data.labels),
        train=tuple(client.n_train for client in seen),
        train_unseen=tuple(client.n_train for client in unseen),
        test=sum(client.n_test for client in data.clients),
        smallest=trains[0],
        middle=int(median(trains)),
        largest=trains[-1],
    )


def _population(exp: ExperimentBase, found: tuple[Population, Inputs | None] | None, notes: list[str]) -> Population:
    """The clients as prepared, else as configured; of natural clients only their data tells the number."""
    if found is not None:
        return found[0]
    clients = exp.task_entry.published_clients
    if clients is not None:
        unseen = len(exp.task.unseen)
        notes.append(f"{clients} clients, {unseen} of them unseen: as published, not as found in the data.")
        return Population(seen=clients - unseen, unseen=unseen)
    if exp.task_entry.clients == "natural":
        raise DataError(
            f"task '{exp.task.name}' has the clients that its data has, and the data is not here: give task.path"
        )
    clients = len(exp.task.languages) * clients_per_language(exp)
    return Population(seen=clients, unseen=clients)


def seconds_per_client(exp: ExperimentBase) -> dict[tuple[str, str], float]:
    """Mean wall seconds per client, by (stage kind, method), from the newest such runs in the storage."""
    storage = Storage(exp.storage)
    found: dict[tuple[str, str], float] = {}
    runs = [RunFolder.open(storage, run_id) for run_id in run_ids(storage)]
    runs.sort(key=lambda run: str(run.info()["created"]), reverse=True)
    for run in runs[:LOOKED_AT]:
        config = run.info()["config"]
        if not _alike(exp, config):
            continue
        methods = {stage["key"]: (stage["kind"], stage["method"]) for stage in run.stages()}
        for stage, rows in run.timings().groupby("stage"):
            if stage in methods:
                found.setdefault(methods[str(stage)], float(rows["seconds"].mean()))
    return found


def _alike(exp: ExperimentBase, config: dict[str, dict[str, object]]) -> bool:
    same = (exp.task.name, exp.task.max_length, exp.model.name, exp.engine.dtype)
    task, model, engine = config["task"], config["model"], config["engine"]
    return same == (task["name"], task["max_length"], model["name"], engine["dtype"])
