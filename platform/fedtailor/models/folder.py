"""A base model's folder: is everything there that loading needs, and the copy of it whose tokenizer can pad.

It is checked before any work and answered in one sentence. The stages of a generation task start from the copy: the
same weights, and where the tokenizer names no padding token the one of FedP2EFT A.2.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from fedtailor.core.errors import ModelError
from fedtailor.core.files import staged_folder
from fedtailor.models.families import check_kind, is_decoder, meta_causal, positions_of
from fedtailor.models.load import load_config, load_tokenizer, quiet
from fedtailor.tasks.source import TaskKind

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")

ADAPTER = "adapter_config.json"
TOKENIZERS = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model",
)  # fmt: skip

PAD = "<pad>"
RECORD = "padding.json"
"""Which token pads, and how it came to do so."""

_COPIED = (".jinja", ".json", ".model", ".txt")


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
            else "; GGUF files are not read: give the model's safetensors"
            if any(name.endswith(".gguf") for name in files)
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
    if ADAPTER in files:
        raise ModelError(
            f"model folder {folder}: {ADAPTER} lies beside the weights, so transformers would load that adapter too; "
            f"merge it into the weights, or move it away"
        )
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
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    config, where = load_config(folder), f"model folder {folder}"
    if (how := getattr(config, "quantization_config", None)) is not None:
        method = dict(how).get("quant_method", "unknown")
        raise ModelError(
            f"{where}: its weights are quantised already ({method}); give the original ones, which "
            f"'model.weights=4bit' or '8bit' quantises when they are loaded"
        )
    check_kind(config, kind, where)
    if not hasattr(config, "vocab_size"):
        raise ModelError(
            f"{where}: a model of several parts ({config.model_type}); give the folder of its language model alone"
        )
    tokenizer = load_tokenizer(folder, padded=kind != "generation")
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"{where}: the tokenizer has {len(tokenizer)} tokens, the model only {config.vocab_size} embeddings"
        )
    if kind == "classification" and is_decoder(config) and tokenizer("a")["input_ids"][-1:] == [tokenizer.pad_token_id]:
        raise ModelError(
            f"{where}: its tokenizer ends every text with the token that pads, '{tokenizer.pad_token}', so that a "
            f"text's last token, where this model is scored, could not be told from padding; set another 'pad_token' "
            f"in its tokenizer_config.json"
        )
    if kind == "generation" and tokenizer.eos_token_id is None:
        raise ModelError(
            f"{where}: its tokenizer has no end-of-text token, which closes an answer; set 'eos_token' in its "
            f"tokenizer_config.json"
        )
    check_length(config, max_length, where, int(tokenizer.model_max_length))


def check_length(config: PretrainedConfig, max_length: int | None, where: str, also: int = 10**9) -> None:
    """Checks that texts are not longer than a model can read.

    Args:
        config: of the model.
        max_length: tokens a text may have; None: not checked.
        where: name of the model for the message.
        also: another limit, of the tokenizer.

    Raises:
        ModelError: they are; says what is allowed.
    """
    positions = min(also, positions_of(config) or 10**9)
    if max_length is not None and max_length > positions:
        raise ModelError(
            f"'task.max_length' ({max_length}) is above what {where} can read: {positions} tokens (allowed: 4 ... "
            f"{positions})"
        )


def settle_padding(tokenizer: PreTrainedTokenizerBase) -> Literal["own", "unknown", "added"]:
    """Gives a tokenizer a padding token, in place, if it has none, and says how it came by it.

    It becomes the unknown token where there is one that is nothing else (MobileLLaMA), or a new one, `PAD`: also where
    the tokenizer has reserved tokens that nobody uses (Llama 3.2), because the paper adds ``<pad>``.
    """
    if tokenizer.pad_token_id is not None:
        return "own"
    unknown = tokenizer.unk_token
    if unknown is not None and unknown not in (tokenizer.bos_token, tokenizer.eos_token):
        tokenizer.pad_token = unknown
        return "unknown"
    tokenizer.add_special_tokens({"pad_token": PAD})
    return "added"


def write_causal(folder: Path, out: Path) -> Path:
    """Writes a causal model's folder anew, with a padding token; the weights keep their type.

    Weights are not loaded: their files are linked where ``out`` is on the same file system, else copied. Only a shard
    with an embedding is rewritten, and only where a new token needs a row.

    Args:
        folder: a complete model, see `check_folder`.
        out: folder to make or replace, as a whole.

    Raises:
        ModelError: the tokenizer cannot be loaded, or the embedding is not found in the files.
    """
    config, tokenizer = load_config(folder), load_tokenizer(folder, padded=False)
    how = settle_padding(tokenizer)
    pad = {"token": str(tokenizer.pad_token), "id": int(tokenizer.pad_token_id), "how": how}
    rows = max(config.vocab_size, len(tokenizer))
    shards = weight_map(folder)
    grown = _embedding_tensors(config, shards, str(folder)) if rows > config.vocab_size else {}
    with staged_folder(out) as stage, quiet():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _COPIED:
                shutil.copyfile(path, stage / path.name)
        for shard in sorted(set(shards.values())):
            if shard in grown:
                _grow_shard(folder / shard, stage / shard, grown[shard], rows)
            else:
                _link(folder / shard, stage / shard)
        if how != "own":
            tokenizer.save_pretrained(stage)
        _rewrite_json(stage / "config.json", {"pad_token_id": pad["id"], "vocab_size": rows})
        record = {**pad, "rows_before": config.vocab_size, "rows": rows}
        (stage / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return out


def _link(source: Path, target: Path) -> None:
    """A second name of the same file (of a hub cache's blob, not of its symbolic link), or a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite_json(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "vocab_size" not in content and "text_config" in content:
        raise ModelError(f"{path}: a model of several parts (text_config) cannot be given a padding token")
    path.write_text(json.dumps(content | values, indent=2) + "\n", encoding="utf-8")


def _embedding_tensors(config: PretrainedConfig, shards: Mapping[str, str], where: str) -> dict[str, set[str]]:
    """The stored tensors with one row per token, by shard.

    Args:
        config: of the model.
        shards: stored name -> file.
        where: name of the model for the message.

    Raises:
        ModelError: the files do not name the input embedding as the model does.
    """
    model = meta_causal(config)
    output: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tables = [*model.get_input_embeddings().parameters(), *output.parameters()]
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if any(parameter is table for table in tables)]
    found: dict[str, set[str]] = {}
    for name in names:
        # Files of a bare body leave its prefix out.
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        stored = name if name in shards else bare
        if stored in shards:
            found.setdefault(shards[stored], set()).add(stored)
    if not found:
        raise ModelError(f"{where}: cannot add a padding token: its files hold none of {', '.join(names)}")
    return found


def _grow_shard(source: Path, target: Path, names: set[str], rows: int) -> None:
    """Copies a shard; the named tensors get ``rows`` rows, the new ones the mean of the old ones."""
    with safe_open(source, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in sorted(shard.keys())}
        metadata = shard.metadata()
    for name in names:
        tensors[name] = with_rows(tensors[name], rows)
    save_file(tensors, target, metadata=metadata)


def with_rows(table: Tensor, rows: int) -> Tensor:
    """A table (V, ...) with ``rows`` >= V rows, the new ones at the mean of the others (Hewitt, 2021).

    Summed in float64 and block by block: no second table in another type, and the same bytes whatever the threads.
    """
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    for block in torch.split(table, 4096):
        total += block.double().sum(0)
    mean = (total / len(table)).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), *table.shape[1:])])
