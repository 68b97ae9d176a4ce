"""The folder that the stages of a generation task start from: the same weights, a tokenizer that can pad."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from fedtailor.core.errors import ModelError
from fedtailor.models.classifier import load_config, load_tokenizer
from fedtailor.models.completeness import weight_map
from fedtailor.models.folder import quiet, staged_folder
from fedtailor.models.padding import settle_padding
from fedtailor.models.vocabulary import embedding_tensors, grow_shard

RECORD = "padding.json"
"""Which token pads, and how it came to do so."""

_COPIED = (".jinja", ".json", ".model", ".txt")


def write_causal(folder: Path, out: Path) -> Path:
    """Writes a causal model's folder anew, with a padding token; the weights keep their type.

    Weights are not loaded: their files are linked where ``out`` is on the same file system, else copied. Only a shard
    with an embedding is rewritten, and only where a new token needs a row.

    Args:
        folder: a complete model, see `completeness.check_folder`.
        out: folder to make or replace, as a whole.

    Raises:
        ModelError: the tokenizer cannot be loaded, or the embedding is not found in the files.
    """
    config, tokenizer = load_config(folder), load_tokenizer(folder, padded=False)
    padding = settle_padding(tokenizer)
    rows = max(config.vocab_size, len(tokenizer))
    shards = weight_map(folder)
    grown = embedding_tensors(config, shards, str(folder)) if rows > config.vocab_size else {}
    with staged_folder(out) as stage, quiet():
        for path in sorted(folder.iterdir()):
            if path.is_file() and path.suffix in _COPIED:
                shutil.copyfile(path, stage / path.name)
        for shard in sorted(set(shards.values())):
            if shard in grown:
                grow_shard(folder / shard, stage / shard, grown[shard], rows)
            else:
                _link(folder / shard, stage / shard)
        if padding.how != "own":
            tokenizer.save_pretrained(stage)
        _rewrite_json(stage / "config.json", {"pad_token_id": padding.id, "vocab_size": rows})
        record = {**asdict(padding), "rows_before": config.vocab_size, "rows": rows}
        (stage / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return out


def _link(source: Path, target: Path) -> None:
    """A second name of the same file (of a hub cache's blob, not of its symbolic link), or a copy."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _rewrite_json(path: Path, values: dict[str, int]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    if "vocab_size" not in content and "text_config" in content:
        raise ModelError(f"{path}: a model of several parts (text_config) cannot be given a padding token")
    path.write_text(json.dumps(content | values, indent=2) + "\n", encoding="utf-8")
