"""Is everything there that loading a base model needs? Asked before any work, answered in one sentence."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForSequenceClassification

from fedtailor.core.errors import ModelError
from fedtailor.models.classifier import load_config, load_tokenizer

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


def check_folder(folder: Path, max_length: int | None = None) -> None:
    """Checks that a sequence classifier can be made from a local folder; reads headers, no weights.

    Args:
        folder: the model's folder.
        max_length: tokens a text may have; None: not checked.

    Raises:
        ModelError: anything is missing, damaged or of the wrong kind; names the file.
    """
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist")
    files = {path.name for path in folder.iterdir()}
    check_listing(f"model folder {folder}", files)
    shards = [WEIGHTS] if WEIGHTS in files else _shards(folder / INDEX)
    missing = [shard for shard in shards if shard not in files]
    if missing:
        raise ModelError(
            f"model folder {folder}: {INDEX} names {len(shards)} shards, {len(missing)} are missing: "
            f"{', '.join(missing)}"
        )
    for shard in shards:
        _check_header(folder / shard)
    _check_kind(folder, max_length)


def _shards(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weight shards: {error!r}") from error


def _check_header(path: Path) -> None:
    try:
        with safe_open(path, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size} bytes) is damaged, incomplete or a pointer to a file that was "
            f"never fetched (Git LFS): {error}"
        ) from error


def _check_kind(folder: Path, max_length: int | None) -> None:
    config = load_config(folder)
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise ModelError(f"{folder}: transformers has no sequence classifier of type '{config.model_type}'")
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size} embeddings"
        )
    positions = min(int(tokenizer.model_max_length), getattr(config, "max_position_embeddings", 10**9))
    if max_length is not None and max_length > positions:
        raise ModelError(f"'task.max_length' ({max_length}) is above what {folder} can read: {positions} tokens")
