"""Data, initial model and tokens of a seed: made once, named by content, reused by every later run."""

from __future__ import annotations

import hashlib
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase

from fedtailor.core.settings import ModelConfig
from fedtailor.experiment.config import ExperimentBase, scaled_task, to_json
from fedtailor.experiment.rules import check_population
from fedtailor.experiment.stages import Inputs, short_hash
from fedtailor.federated.attack import attack_of
from fedtailor.models import hub
from fedtailor.models.embedded import build_tiny_bert, build_tiny_llama
from fedtailor.models.load import load_tokenizer
from fedtailor.models.source import EMBEDDED_KINDS, resolve
from fedtailor.storage.artifacts import Artifacts
from fedtailor.tasks import prompts
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare
from fedtailor.tasks.tokens import tokenise


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
    artifacts.ensure(tokens_name, lambda out: _tokens(data, tokenizer, exp.task, out))
    return Inputs(data_name, model_name, tokens_name)


def _data(exp: ExperimentBase, seed: int, artifacts: Artifacts) -> tuple[TaskData, str]:
    # The name is the content's hash, so the data is always made; that takes seconds and catches changed files.
    task = scaled_task(exp)
    with TemporaryDirectory(dir=artifacts.folder, prefix=".data-") as made:
        data = prepare(task, seed, Path(made))
        if exp.task_entry.clients == "natural":
            check_population(exp, len(data.pool("seen")))
        attack_of(exp.attack, [client.id for client in data.pool("seen")])
        name = f"data-{data.hash[:16]}"
        folder = artifacts.ensure(name, lambda out: _move_files(Path(made), out))
    return TaskData.open(folder), name


def model_artifact(exp: ExperimentBase, seed: int, data: TaskData) -> str:
    """Name of the initial model: depends on the task only through kind, labels, length and (embedded) train texts.

    A language model that is not embedded gets no new weights: seeds share it.
    """
    content: dict[str, object] = {"model": _identity(exp.model)}
    if data.kind == "classification":
        content |= {"labels": list(data.labels), "seed": seed}
    else:
        content |= {"kind": data.kind}
    if exp.model.name in EMBEDDED_KINDS:
        content |= {"seed": seed}
        content |= {"texts": _texts_hash(data), "max_length": exp.task.max_length}
    return f"model-{short_hash(content)}"


def tokens_artifact(exp: ExperimentBase, data: str, model: str) -> str:
    """Name of the tokenised clients."""
    content: list[object] = [data, model, exp.task.max_length]
    if exp.task_entry.kind == "generation":
        content += [prompts.identity(exp.task.template), exp.task.overlong]
    return f"tokens-{short_hash(content)}"


def _identity(cfg: ModelConfig) -> dict[str, object]:
    plain = to_json(cfg)
    for key in ("targets", "base_dropout", "path", "attention", "weights", "checkpointing"):
        plain.pop(key)
    if cfg.name not in EMBEDDED_KINDS:
        return {"source": hub.fingerprint(resolve(cfg))}
    return plain


def _texts_hash(data: TaskData) -> str:
    digest = hashlib.sha256()
    for text in data.train_texts("seen"):
        digest.update(text.encode() + b"\0")
    return digest.hexdigest()


def _model(exp: ExperimentBase, seed: int, data: TaskData, out: Path) -> None:
    if exp.model.name == "tiny-bert":
        # Seen train texts only: an unseen client's words must not shape the vocabulary.
        build_tiny_bert(data.train_texts("seen"), data.labels, exp.model, exp.task.max_length, seed, out)
    elif exp.model.name == "tiny-llama":
        build_tiny_llama(data.train_texts("seen"), exp.model, exp.task.max_length, seed, out)
    else:
        hub.materialise(exp.model, data.labels, seed, out, data.kind)


def _tokens(data: TaskData, tokenizer: PreTrainedTokenizerBase, task: TaskConfig, out: Path) -> None:
    tokenise(data, tokenizer, task.max_length, out, task.template, task.overlong)


def _move_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        path.rename(target / path.name)
