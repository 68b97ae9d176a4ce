"""From documents to rows of equal length, and which rows a step reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import StorageError
from fedtailor.core.seeding import numpy_rng
from fedtailor.models.load import quiet
from fedtailor.models.pretrain_corpus import Document

Rows = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Blocks:
    """Packed rows by stream, int32 (rows, block); every row is [CLS] and the next block - 1 tokens of its stream."""

    train: Mapping[str, Rows]
    held_out: Mapping[str, Rows]

    def save(self, path: Path) -> None:
        """Writes all rows to one safetensors file."""
        save_file({f"{part}:{stream}": rows for part, stream, rows in self._parts()}, path)

    @classmethod
    def open(cls, path: Path) -> Blocks:
        """Reads what `save` wrote."""
        parts: dict[str, dict[str, Rows]] = {"train": {}, "held_out": {}}
        for name, rows in sorted(load_file(path).items()):
            part, _, stream = name.partition(":")
            parts[part][stream] = rows
        return cls(**parts)

    def describe(self, pad: int) -> dict[str, Any]:
        """Tokens (no padding) of both parts, and of each stream's train part, for ``pretrain.json``."""
        tokens = {(part, stream): int((rows != pad).sum()) for part, stream, rows in self._parts()}
        return {
            "train_tokens": sum(n for (part, _), n in tokens.items() if part == "train"),
            "held_out_tokens": sum(n for (part, _), n in tokens.items() if part == "held_out"),
            "streams": {stream: n for (part, stream), n in tokens.items() if part == "train"},
        }

    def _parts(self) -> list[tuple[str, str, Rows]]:
        both = (("train", self.train), ("held_out", self.held_out))
        return [(part, stream, streams[stream]) for part, streams in both for stream in sorted(streams)]


def pack(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, block: int) -> Rows:
    """Rows of one stream: texts end in [SEP], a row goes on where the last one stopped (RoBERTa's FULL-SENTENCES).

    The stream's last, shorter row is dropped, or padded if it is the only one.

    Args:
        documents: in the order in which they are read.
        tokenizer: with [CLS], [SEP] and [PAD].
        block: tokens of a row.

    Returns:
        int32 (rows, block); (0, block) without documents.
    """
    texts = [text for document in documents for text in document]
    if not texts:
        return np.empty((0, block), dtype=np.int32)
    with quiet():  # texts longer than the model's positions are meant to be
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False)
    ends = [tokenizer.sep_token_id]
    flat = np.concatenate([np.array(ids + ends, dtype=np.int32) for ids in encoded["input_ids"]])
    room = block - 1
    if len(flat) < room:
        flat = np.concatenate([flat, np.full(room - len(flat), tokenizer.pad_token_id, dtype=np.int32)])
    rows = flat[: len(flat) // room * room].reshape(-1, room)
    first = np.full((len(rows), 1), tokenizer.cls_token_id, dtype=np.int32)
    return np.ascontiguousarray(np.concatenate([first, rows], axis=1))


def pack_all(
    documents: Mapping[str, Sequence[Document]], tokenizer: PreTrainedTokenizerBase, block: int
) -> dict[str, Rows]:
    """`pack` for every stream that has documents, by name."""
    return {stream: pack(documents[stream], tokenizer, block) for stream in sorted(documents) if documents[stream]}


@dataclass
class Sampler:
    """Draws the rows of each step: the stream by smoothed size, within a stream each row once per epoch.

    Args:
        rows: train rows by stream.
        smoothing: alpha; 1 draws in proportion to size, 0 evenly.
        batch: rows of a step.
        seed: run seed.
        drawn: rows drawn of each stream so far; with the step number this is the whole position.
    """

    rows: Mapping[str, Rows]
    smoothing: float
    batch: int
    seed: int
    drawn: dict[str, int] = field(default_factory=dict)
    _orders: dict[str, tuple[int, npt.NDArray[np.int64]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.drawn and set(self.drawn) != set(self.rows):
            raise StorageError(f"the checkpoint reads {json.dumps(sorted(self.drawn))}, the corpus has other streams")
        self.drawn = {stream: self.drawn.get(stream, 0) for stream in sorted(self.rows)}

    def probabilities(self) -> npt.NDArray[np.float64]:
        """Of each stream in alphabetical order."""
        weights = np.array([float(len(self.rows[s])) ** self.smoothing for s in self.drawn])
        return np.asarray(weights / weights.sum(), dtype=np.float64)

    def next(self, step: int) -> npt.NDArray[np.int64]:
        """Rows of a step, int64 (batch, block); steps must be asked for in order."""
        streams = list(self.drawn)
        chosen = numpy_rng(self.seed, "pretrain", "streams", step).choice(
            len(streams), size=self.batch, p=self.probabilities()
        )
        return np.stack([self._take(streams[i]) for i in chosen]).astype(np.int64)

    def _take(self, stream: str) -> Rows:
        rows = self.rows[stream]
        epoch, at = divmod(self.drawn[stream], len(rows))
        if self._orders.get(stream, (-1,))[0] != epoch:
            order = numpy_rng(self.seed, "pretrain", "rows", stream, epoch).permutation(len(rows))
            self._orders[stream] = (epoch, order)
        self.drawn[stream] += 1
        taken: Rows = rows[self._orders[stream][1][at]]
        return taken
