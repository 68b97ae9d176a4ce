"""What a plan finds on this machine of a run's surroundings, data and tokens; what a run would refuse is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import try_to_load_from_cache

from fedtailor.core.errors import DataError, ModelError, TailorError
from fedtailor.experiment.config import ExperimentBase, clients_per_language
from fedtailor.experiment.estimate import Population
from fedtailor.experiment.prepare import (
    check_placement,
    check_tokenizer,
    checked_data,
    model_artifact,
    tokens_artifact,
    write_tokens,
)
from fedtailor.experiment.rules import check_weights
from fedtailor.experiment.stages import Inputs
from fedtailor.models.folder import settle_padding
from fedtailor.models.load import load_tokenizer
from fedtailor.models.source import resolve
from fedtailor.storage.artifacts import artifact_path
from fedtailor.storage.files import Storage
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.tokens import TokenData, unknown_tokens
from fedtailor.tracking.wandb_key import check_wandb

MOST_TOKENISED = 10_000
"""Texts up to which a plan tokenises them, which takes some seconds."""


def note_surroundings(exp: ExperimentBase, notes: list[str]) -> None:
    """Notes what a run on this machine would be refused for; another machine may have it."""
    checks: tuple[Callable[[], None], ...] = (
        partial(check_placement, exp),
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
            data = checked_data(exp, seed, Path(folder) / "data")
        except DataError as error:
            if exp.task.path:
                raise
            notes.append(f"Client sizes are unknown: {error}")
            return None, None, None
        seen, unseen = data.pool("seen"), data.pool("unseen")
        population = Population(
            seen=len(seen),
            unseen=len(unseen),
            classes=len(data.labels),
            train=tuple(client.n_train for client in seen),
            train_unseen=tuple(client.n_train for client in unseen),
            test=sum(client.n_test for client in data.clients),
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
    generation = exp.task_entry.kind == "generation"
    tokenizer = load_tokenizer(model, padded=not generation)
    if generation:
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
        name, model = f"data-{data.hash[:16]}", model_artifact(exp, seed, data)
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
    clients = len(exp.task.languages) * clients_per_language(exp)
    return Population(seen=clients, unseen=clients)
