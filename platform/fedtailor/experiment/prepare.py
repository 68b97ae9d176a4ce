"""Everything that can be found wrong with an experiment before its run exists, and what is made before it starts.

Data, initial model and tokens of a seed are made once, named by content, and reused by every later run; if something
is wrong, nothing is left behind.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedtailor.core.config import deviations
from fedtailor.core.errors import ConfigError, PlacementError, StorageError
from fedtailor.experiment.config import (
    ExperimentBase,
    base_seed,
    overrides_of,
    scaled_task,
    stored_experiment,
    to_json,
)
from fedtailor.experiment.mix_rules import check_clusters
from fedtailor.experiment.rules import check_population, check_weights, check_whole_logits
from fedtailor.experiment.stages import Inputs, short_hash
from fedtailor.experiment.tokenising import tokens_artifact, write_tokens
from fedtailor.experiment.trial import try_model
from fedtailor.federated.pool import OnEvent
from fedtailor.federated.updates import attack_of
from fedtailor.models import hub
from fedtailor.models.embedded import build_embedded, build_linear
from fedtailor.models.folder import check_folder
from fedtailor.models.load import load_tokenizer
from fedtailor.models.source import EMBEDDED_KINDS, resolve
from fedtailor.storage.artifacts import Artifacts
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks import prompts
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare as prepare_task
from fedtailor.tasks.tokens import TokenData
from fedtailor.tasks.unknown_tokens import unknown_tokens
from fedtailor.tracking.wandb_key import check_wandb

_COPIES, _COPY = "working_dir_files", "_ray_pkg_"
"""Where Ray unpacks the working directories of jobs, ``runtime_resources/working_dir_files/_ray_pkg_HASH``."""

_FREE = ("storage", "wandb", "engine.address")
"""Keys that may change between two starts of one run."""


def prepare(exp: ExperimentBase, run_id: str, emit: OnEvent) -> RunFolder:
    """Checks the surroundings, cheapest first, prepares the data, then makes or reopens the run's folder.

    Raises:
        TailorError: what is wrong with run id, GPUs, model or data.
    """
    check_storage(exp)
    storage = Storage(exp.storage)
    refuse_other_configuration(storage, run_id, exp)
    check_placement(exp)
    check_wandb(exp.wandb, exp.save_adapters)
    hub.check_available(exp.model, exp.task.max_length, exp.task_entry.kind)
    check_weights(exp)
    check_whole_logits(exp)
    check_clusters(exp)
    if exp.task_entry.kind == "generation":
        prompts.check_name(exp.task.template)
    prepare_data(exp, emit)
    return run_folder(exp, run_id)


def check_storage(exp: ExperimentBase) -> None:
    """Refuses a storage that would lose what the run keeps there.

    Raises:
        ConfigError: a job's copy of the code, or one process's memory for a run in several.
    """
    refuse_job_folder("storage", exp.storage)
    if exp.storage.startswith("memory:") and exp.engine.backend != "serial":
        raise ConfigError(
            f"'storage' = {exp.storage}: its files live in one process, and engine.backend={exp.engine.backend} "
            "runs in several; use engine.backend=serial, a folder or an object store"
        )


def refuse_job_folder(key: str, url: str | os.PathLike[str]) -> None:
    """Refuses to keep results in a job's copy of the code.

    Args:
        key: what named the place, for the message.
        url: local folder, relative ones are meant from here, or any other URL.

    Raises:
        ConfigError: names the key, the place and what to give instead.
    """
    storage = Storage(url)
    if not storage.is_local:
        return
    place = storage.local_path().resolve()
    if any(folder.name.startswith(_COPY) and folder.parent.name == _COPIES for folder in (place, *place.parents)):
        raise ConfigError(
            f"'{key}': {os.fspath(url)} lies in this Ray job's copy of the working directory ({place}), which Ray "
            "deletes; give a folder that all nodes see, e.g. /shared/runs"
        )


def run_folder(exp: ExperimentBase, run_id: str) -> RunFolder:
    """Makes the run's folder, or opens it if it is this experiment's.

    Raises:
        StorageError: see `RunFolder.create` and `refuse_other_configuration`.
    """
    folder = RunFolder.create(Storage(exp.storage), run_id, to_json(exp), overrides_of(exp))
    refuse_other_configuration(folder.storage, run_id, exp)
    return folder


def refuse_other_configuration(storage: Storage, run_id: str, exp: ExperimentBase) -> None:
    """Refuses a run id that belongs to another experiment.

    Raises:
        StorageError: names the keys that differ.
    """
    if not storage.exists(f"{run_id}/run.json"):
        return
    stored = RunFolder.open(storage, run_id).info()["config"]
    changed: dict[str, tuple[Any, Any]] = {"code": (stored.get("code", {}), dict(exp.code))}
    if changed["code"][0] == changed["code"][1]:  # code of another run is not imported to be compared
        changed = {k: v for k, v in deviations(exp, stored_experiment(stored)).items() if not k.startswith(_FREE)}
    if changed:
        told = "; ".join(f"{key} is {before!r} there and {now!r} here" for key, (before, now) in changed.items())
        raise StorageError(f"run id '{run_id}' belongs to another configuration: {told}. Choose another --run-id")


def check_placement(exp: ExperimentBase) -> None:
    """Refuses GPUs that a local run cannot have; a cluster that is joined is asked when actors are placed.

    Raises:
        PlacementError: with what is asked and what is there.
    """
    engine = exp.engine
    if exp.engine.device == "cpu" or (engine.address or os.environ.get("RAY_ADDRESS", "local")) != "local":
        return
    sizes = [torch.cuda.get_device_properties(i).total_memory / 1e9 for i in range(torch.cuda.device_count())]
    if engine.memory_gb is not None:
        asked = f"engine.memory_gb={engine.memory_gb:g}"
        capacity = sum(int(size / engine.memory_gb) for size in sizes)
    else:
        asked, share = f"engine.num_gpus={engine.num_gpus:g}", engine.num_gpus
        capacity = int(len(sizes) / share) if share >= 1 else len(sizes) * int(1 / share)
    ranks = engine.zero.ranks
    wanted = (engine.actors or 1) * ranks
    if capacity < wanted:
        gpus = ", ".join(f"{size:.1f} GB" for size in sizes) or "none"
        who = f"{wanted} actor(s)" if ranks == 1 else f"{wanted} process(es) (engine.zero.ranks={ranks} of each actor)"
        lower = "engine.actors or the share" if ranks == 1 else "engine.zero.ranks or engine.actors"
        raise PlacementError(
            f"{asked} for {who} cannot be placed: this machine's GPUs ({gpus}) hold {capacity}. "
            f"Lower {lower}, use engine.num_gpus=0, or join a cluster with engine.address"
        )


def prepare_data(exp: ExperimentBase, emit: OnEvent) -> None:
    """Makes the inputs of all seeds, named by content; if that fails, folders made for them go again.

    Raises:
        DataError, ModelError, StorageError: see `make_inputs`.
    """
    artifacts = Artifacts(
        Storage(exp.storage), "preparing", on_wait=lambda text: emit({"kind": "waiting", "text": text})
    )
    new = [folder for folder in (artifacts.folder, *artifacts.folder.parents) if not folder.exists()]
    try:
        for seed in dict.fromkeys(base_seed(exp, seed) for seed in exp.seeds):
            emit({"kind": "stage", "stage": f"data/seed{seed}", "state": "checking"})
            make_inputs(exp, seed, artifacts)
    except BaseException:
        for folder in new:
            with suppress(OSError):
                folder.rmdir()  # removes what is empty only
        raise


def make_inputs(exp: ExperimentBase, seed: int, artifacts: Artifacts) -> Inputs:
    """Prepares what is missing and returns the artifact names.

    Args:
        exp: whole configuration.
        seed: run seed.
        artifacts: where they are kept.

    Raises:
        ConfigError: a cohort above the seen clients, where only the data tells how many there are.
        DataError, ModelError: see `tasks` and `models`; nothing half made is left behind.
        StorageError: the storage or this node's cache failed.
    """
    artifacts.folder.mkdir(parents=True, exist_ok=True)
    data, data_name = _data(exp, seed, artifacts)
    model_name = model_artifact(exp, seed, data)
    model = artifacts.ensure(model_name, lambda out: _model(exp, seed, data, out))
    tokens_name = tokens_artifact(exp, data_name, model_name)
    tokenizer = load_tokenizer(model)
    tokens = TokenData.open(artifacts.ensure(tokens_name, partial(write_tokens, exp, data, tokenizer)))
    return Inputs(data_name, model_name, tokens_name, unknown_tokens(data, tokens, tokenizer))


def checked_data(exp: ExperimentBase, seed: int, out: Path) -> TaskData:
    """Prepares a seed's data in a folder; refuses cohorts and attackers that they do not have.

    Raises:
        ConfigError, DataError: see `tasks.task.prepare`, `rules.check_population` and `updates.attack_of`.
    """
    data = prepare_task(scaled_task(exp), seed, out)
    if exp.task_entry.clients != "dealt":
        check_population(exp, len(data.pool("seen")))
    attack_of(exp.attack, [client.id for client in data.pool("seen")])
    return data


def _data(exp: ExperimentBase, seed: int, artifacts: Artifacts) -> tuple[TaskData, str]:
    # The name is the content's hash, so the data is always made; that takes seconds and catches changed files.
    with TemporaryDirectory(dir=artifacts.folder, prefix=".data-") as made:
        data = checked_data(exp, seed, Path(made, "data"))
        name = f"data-{data.hash[:16]}"
        folder = artifacts.ensure(name, data.path.rename)
    return TaskData.open(folder), name


def model_artifact(exp: ExperimentBase, seed: int, data: TaskData) -> str:
    """Name of the initial model: depends on the task only through kind, labels, length and (embedded) train texts.

    A language model that is not embedded gets no new weights: seeds share it.
    """
    content: dict[str, object] = {"kind": data.kind}
    if data.kind in ("classification", "extraction"):  # a fresh head depends on the seed
        content = {**({"labels": list(data.labels)} if data.kind == "classification" else content), "seed": seed}
    if exp.model.name in EMBEDDED_KINDS:
        unused = ("targets", "base_dropout", "path", "attention", "weights", "checkpointing")
        sizes = {key: value for key, value in to_json(exp.model).items() if key not in unused}
        content |= {"model": sizes, "seed": seed, "texts": _texts_hash(data), "max_length": exp.task.max_length}
    else:
        content["model"] = {"source": hub.fingerprint(resolve(exp.model))}
    return f"model-{short_hash(content)}"


def _texts_hash(data: TaskData) -> str:
    digest = hashlib.sha256()
    for text in data.every_text() if data.kind == "regression" else data.train_texts("seen"):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _model(exp: ExperimentBase, seed: int, data: TaskData, out: Path) -> None:
    if data.kind == "regression":
        build_linear(data.every_text(), out)
    elif exp.model.name in EMBEDDED_KINDS:
        # Seen train texts only: an unseen client's words must not shape the vocabulary.
        build_embedded(data.train_texts("seen"), data.labels, exp.model, exp.task.max_length, seed, out, data.kind)
    else:
        folder = hub.fetch(resolve(exp.model), data.kind)
        check_folder(folder, exp.task.max_length, data.kind)
        try_model(exp.model, data.kind, folder)  # what there is to know of it is said when a stage opens it
        hub.materialise(exp.model, data.labels, seed, out, data.kind, exp.task.max_length)
