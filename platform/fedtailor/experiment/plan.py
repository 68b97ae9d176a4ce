"""Plan of an experiment from sizes alone: stages, bytes, memory, work. No weights are read or made.

Of this machine's surroundings, data and tokens, what a run would refuse is refused. How long clients took comes from
earlier runs of the same task and model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fedtailor.core.errors import DataError, ModelError, TailorError
from fedtailor.experiment import prepare
from fedtailor.experiment.config import (
    ExperimentBase,
    base_seed,
    method_notes,
    method_of,
    seen_clients,
    to_json,
)
from fedtailor.experiment.estimate import Estimate, Population, estimate
from fedtailor.experiment.fit import Fit, fit
from fedtailor.experiment.mix_rules import check_clusters
from fedtailor.experiment.rules import check_weights, check_whole_logits
from fedtailor.experiment.sizes import MethodSizes, method_sizes, rank_notes
from fedtailor.experiment.stages import Inputs, Stage, plan_stages
from fedtailor.experiment.tokenising import check_tokenizer, tokens_artifact, write_tokens
from fedtailor.experiment.trial import try_model
from fedtailor.federated.method import Method
from fedtailor.models.dimensions import ModelDimensions, dimensions
from fedtailor.models.folder import settle_padding
from fedtailor.models.hub import check_available
from fedtailor.models.load import load_tokenizer
from fedtailor.models.source import resolve
from fedtailor.storage.artifacts import artifact_path
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import DONE, RunFolder, run_ids
from fedtailor.tasks.prompts import check_name
from fedtailor.tasks.squad import dropped_sentence
from fedtailor.tasks.store import TaskData, clients_of
from fedtailor.tasks.tokens import TokenData
from fedtailor.tasks.unknown_tokens import unknown_tokens
from fedtailor.tasks.validation import pool_sentence
from fedtailor.tracking.wandb_key import check_wandb

LOOKED_AT = 20
"""Newest runs whose times are looked at."""

MOST_TOKENISED = 10_000
"""Texts up to which a plan tokenises them, which takes some seconds."""


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
    """All that `plan_views` shows."""

    exp: ExperimentBase
    model: ModelDimensions
    sizes: Mapping[str, MethodSizes]
    population: Population
    stages: Sequence[StagePlan]
    notes: Sequence[str]
    fit: Fit
    unknown: Mapping[str, tuple[int, int]]
    data: Mapping[str, Any] | None = None
    """Manifest of the first seed's data, where they are at hand."""


def make_plan(exp: ExperimentBase, memory_gb: float | None = None) -> Plan:
    """Computes the plan of a checked configuration.

    Args:
        exp: whole configuration.
        memory_gb: memory of one worker to plan for; by default what is found here.

    Raises:
        ConfigError: ``attack.clients`` names somebody whom the data does not have, or a run would refuse the storage,
            the template or a cohort.
        DataError: ``task.path`` is given and unusable, also for the model's chat template.
        ModelError: no config of the model is to be had, or a local model cannot serve.
    """
    notes: list[str] = []
    prepare.check_storage(exp)
    if exp.task_entry.kind == "generation":
        check_name(exp.task.template)
    note_surroundings(exp, notes)
    model = _try_model(exp, notes)
    check_whole_logits(exp)
    check_clusters(exp)
    if every := exp.strategy.evaluate_every:
        notes.append(f"Models are scored after every {every} rounds ('strategy.evaluate_every'), which is not counted.")
    data = {seed: inputs_here(exp, seed, model, notes) for seed in dict.fromkeys(base_seed(exp, s) for s in exp.seeds)}
    population, inputs, manifest = next(iter(data.values()))
    population = population or configured_population(exp, notes)
    seen = [client.id for client in clients_of(manifest) if client.pool == "seen"] if manifest else None
    dims = dimensions(exp.model, population.classes, exp.task.max_length, exp.task_entry.kind)

    @cache
    def sized(name: str, r_max: int) -> tuple[Method, MethodSizes]:
        method = method_of(exp, name, r_max)
        return method, method_sizes(exp, method, population.classes, population.seen if seen is None else seen)

    def work_of(stage: Stage, other: ExperimentBase = exp) -> Estimate:
        method, size = sized(stage.method, stage.r_max)
        own = size.private - size.state + size.ephemeral
        apart = method.validation_pool and population.train
        clients = replace(population, train=population.train_apart) if apart else population
        return estimate(other, stage, method, (size.shared, own), dims, clients)

    stages: dict[str, StagePlan] = {}  # seeds that share a base list it once
    storage = Storage(exp.storage)
    for seed in exp.seeds:
        known = data[base_seed(exp, seed)][1]
        for stage in plan_stages(exp, seed, known or Inputs("data", "model", "tokens"), population.seen):
            there = storage.exists(f"artifacts/{stage.artifact}/{DONE}") if known else None
            stages.setdefault(stage.key, StagePlan(stage, there, work_of(stage)))
    fitting = fit(
        exp,
        lambda other: max((work_of(row.stage, other) for row in stages.values()), key=lambda work: work.memory),
        memory_gb,
    )
    sizes = {name: sized(name, exp.r_max)[1] for name in exp.used_methods}
    unknown, said = inputs.unknown if inputs else {}, [*method_notes(exp, exp.methods), *rank_notes(exp, sizes)]
    told = list(dict.fromkeys(filter(None, [pool_sentence(exp.task, exp.task_entry.kind), *said, *notes])))
    return Plan(exp, dims, sizes, population, list(stages.values()), told, fitting, unknown, manifest)


def note_surroundings(exp: ExperimentBase, notes: list[str]) -> None:
    """Notes what a run on this machine would be refused for; another machine may have it."""
    checks: tuple[Callable[[], None], ...] = (
        partial(prepare.check_placement, exp),
        partial(check_weights, exp),
        partial(check_wandb, exp.wandb, exp.save_adapters),
    )
    for check in checks:
        try:
            check()
        except TailorError as error:
            notes.append(f"A run on this machine would be refused: {error}.")


def inputs_here(
    exp: ExperimentBase, seed: int, model: Path | None, notes: list[str]
) -> tuple[Population | None, Inputs | None, Mapping[str, Any] | None]:
    """Clients of a seed, the names of its inputs and its data's manifest, each if it can be known.

    What a run would refuse of them is refused.
    """
    if not (exp.task.path or os.environ.get("FEDTAILOR_DATA") or exp.task_entry.embedded):
        notes.append("The data is not here (task.path, FEDTAILOR_DATA): client sizes are unknown.")
        return None, None, None
    with TemporaryDirectory(prefix="fedtailor-plan-") as folder:
        try:
            data = prepare.checked_data(exp, seed, Path(folder) / "data")
        except DataError as error:
            if exp.task.path:
                raise
            notes.append(f"Client sizes are unknown: {error}")
            return None, None, None
        notes += filter(None, [dropped_sentence(data.manifest["notes"])])
        seen, unseen = data.pool("seen"), data.pool("unseen")
        apart = tuple(client.n_train for client in TaskData.open(data.path, True).pool("seen"))
        population = Population(
            seen=len(seen),
            unseen=len(unseen),
            classes=len(data.labels),
            train=tuple(client.n_train for client in seen),
            train_apart=apart,
            train_unseen=tuple(client.n_train for client in unseen),
            test=sum(client.n_test for client in data.clients),
            pool=sum(client.n_train for client in seen) - sum(apart),
        )
        inputs = _inputs(exp, seed, data, notes)
        unknown = _unknown(exp, data, inputs, model, Path(folder) / "tokens")
        return population, inputs and replace(inputs, unknown=unknown), data.manifest


def _unknown(
    exp: ExperimentBase, data: TaskData, inputs: Inputs | None, model: Path | None, folder: Path
) -> Mapping[str, tuple[int, int]]:
    """Unknown tokens, in a run's tokens or in those made here of data that is not large; empty without tokenizer."""
    storage = Storage(exp.storage)
    if inputs is not None and storage.is_local:
        made, tokens = (storage.local_path(artifact_path(name)) for name in (inputs.model, inputs.tokens))
        if made.is_dir() and tokens.is_dir():
            return unknown_tokens(data, TokenData.open(tokens), load_tokenizer(made))
    if model is None:
        return {}
    tokenizer = load_tokenizer(model, padded=exp.task_entry.kind != "generation")
    if exp.task_entry.kind == "generation":
        settle_padding(tokenizer)
    if data.manifest["rows"] > MOST_TOKENISED:
        check_tokenizer(exp, data, tokenizer)
        return {}
    return unknown_tokens(data, write_tokens(exp, data, tokenizer, folder), tokenizer)


def _inputs(exp: ExperimentBase, seed: int, data: TaskData, notes: list[str]) -> Inputs | None:
    source = resolve(exp.model)
    cached = source.kind != "hub" or isinstance(
        try_to_load_from_cache(source.location, "config.json", revision=source.revision), str
    )
    try:
        if not cached:
            raise ModelError(f"{source.location} is not in the local cache")
        name, model = f"data-{data.hash[:16]}", prepare.model_artifact(exp, seed, data)
    except ModelError as error:
        notes.append(f"Artifact names depend on the model's weights, which are not here: {error}.")
        return None
    return Inputs(name, model, tokens_artifact(exp, name, model))


def configured_population(exp: ExperimentBase, notes: list[str]) -> Population:
    """The clients without their data: as published or as configured; of natural clients only the data tells."""
    clients = exp.task_entry.published_clients
    if clients is not None:
        unseen = len(exp.task.unseen)
        notes.append(f"{clients} clients, {unseen} of them unseen: as published, not as found in the data.")
        return Population(seen=clients - unseen, unseen=unseen)
    if exp.task_entry.clients != "dealt":
        raise DataError(
            f"task '{exp.task.name}' has the clients that its data has, and the data is not here: give task.path"
        )
    clients = seen_clients(exp)
    return Population(seen=clients, unseen=clients if "unseen" in exp.task.pools else 0)


def _try_model(exp: ExperimentBase, notes: list[str]) -> Path | None:
    """Checks a model as far as its files are here, and tries it; their folder."""
    folder = check_available(exp.model, exp.task.max_length, exp.task_entry.kind, ask=False)
    if folder is not None:
        notes += [f"{x[:1].upper()}{x[1:]}." for x in try_model(exp.model, exp.task_entry.kind, folder)]
    return folder


def seconds_per_client(exp: ExperimentBase) -> dict[tuple[str, str], float]:
    """Mean wall seconds per client, by (stage kind, method), from the newest such runs in the storage."""
    storage = Storage(exp.storage)
    same = _timed_by(to_json(exp))
    found: dict[tuple[str, str], float] = {}
    runs = [RunFolder.open(storage, run_id) for run_id in run_ids(storage)]
    runs.sort(key=lambda run: str(run.info()["created"]), reverse=True)
    for run in runs[:LOOKED_AT]:
        if _timed_by(run.info()["config"]) != same:
            continue
        methods = {stage["key"]: (stage["kind"], stage["method"]) for stage in run.stages()}
        for stage, rows in run.timings().groupby("stage"):
            if stage in methods:
                found.setdefault(methods[str(stage)], float(rows["seconds"].mean()))
    return found


def _timed_by(config: Mapping[str, Any]) -> tuple[Any, ...]:
    """What two runs must have in common for one's times to be expected of the other."""
    task, model = config["task"], config["model"]
    own = (model.get(key) for key in ("name", "path", "weights"))
    return task["name"], task.get("path"), task["max_length"], *own, config["engine"]["dtype"]
