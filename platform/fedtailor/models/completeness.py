"""Is everything there that loading a base model needs? Asked before any work, answered in one sentence."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedtailor.core.errors import ModelError
from fedtailor.models.classifier import load_config, load_tokenizer
from fedtailor.models.scores import check_kind
from fedtailor.tasks.source import TaskKind

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)


def check_listing(where: str, files: Set[str]) -> None:
    """Checks by file names alone, for a folder or a hub repository.

    Args:
        where: name of the place for the message.
        files: names at its top level.

    Raises:
        ModelError: config, safetensors weights or tokenizer files are missing.
    """
    if "config.json" not in files:
        raise ModelError(f"{where} is not a model: it has no config.json")
    if not files & {WEIGHTS, INDEX}:
        pickled = sorted(files & set(PICKLED))
        hint = (
            f"; {pickled[0]} is pickle, which is never loaded: convert it with "
            f"save_pretrained(..., safe_serialization=True)"
            if pickled
            else ""
        )
        raise ModelError(f"{where} has no weights: expected {WEIGHTS}, or {INDEX} and its shards{hint}")
    if not files & set(TOKENIZERS):
        raise ModelError(f"{where} has no tokenizer: expected one of {', '.join(TOKENIZERS)}")


def check_folder(folder: Path, max_length: int | None = None, kind: TaskKind = "classification") -> None:
    """Checks that a model for a kind of task can be made from a local folder; reads headers, no weights.

    Args:
        folder: the model's folder.
        max_length: tokens a text may have; None: not checked.
        kind: of the task: a sequence classifier, or a causal language model, which may do without a padding token.

    Raises:
        ModelError: anything is missing, damaged or of the wrong kind; names the file.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    files = {path.name for path in folder.iterdir()}
    check_listing(f"model folder {folder}", files)
    shards = [WEIGHTS] if WEIGHTS in files else sorted(set(_index(folder / INDEX).values()))
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise ModelError(
            f"model folder {folder}: {INDEX} names {len(shards)} shards, {len(missing)} are missing: "
            f"{', '.join(missing)}"
        )
    for shard in shards:
        _check_header(folder / shard)
    _check_use(folder, max_length, kind)


def weight_map(folder: Path) -> dict[str, str]:
    """Stored tensors of a complete folder and the file that holds each.

    Raises:
        ModelError: the index of shards cannot be read.
    """
    if not (folder / WEIGHTS).exists():
        return _index(folder / INDEX)
    with safe_open(folder / WEIGHTS, framework="pt") as weights:
        return dict.fromkeys(weights.keys(), WEIGHTS)


def _index(path: Path) -> dict[str, str]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} is not an index of weight shards: {error!r}") from error


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) is damaged, incomplete or a pointer to a file that was "
            f"never fetched (Git LFS): {error}"
        ) from error


def _check_use(folder: Path, max_length: int | None, kind: TaskKind) -> None:
    config = load_config(folder)
    check_kind(config, kind, str(folder))
    tokenizer = load_tokenizer(folder, padded=kind == "classification")
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size} embeddings"
        )
    if kind == "generation" and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{folder}: its tokenizer has no end-of-text token, which closes an answer; set 'eos_token' in its "
            f"tokenizer_config.json"
        )
    positions = min(int(tokenizer.model_max_length), getattr(config, "max_position_embeddings", 10**9))
    if max_length is not None and max_length > positions:
        raise ModelError(f"'task.max_length' ({max_length}) is above what {folder} can read: {positions} tokens")
