"""Tokenised clients: each text or pair of the table is tokenised once; clients point to rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedtailor.tasks.arrow import BLOCK, open_stream, write_stream
from fedtailor.tasks.encoding import check, encode
from fedtailor.tasks.source import Split
from fedtailor.tasks.store import Client, Membership, TaskData, clients_of, read_manifest

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]

TOKENS = pa.schema({"ids": pa.large_list(pa.int32()), "label": pa.int32()})
"""tokens.arrow: row i belongs to row i of texts.arrow."""
SEGMENTS = TOKENS.append(pa.field("first", pa.int32()))
"""tokens.arrow of pairs whose tokenizer tells segments apart: `first` tokens belong to the first one."""


@dataclass(frozen=True)
class Examples:
    """Texts or pairs, padded to the longest: of a client's split, to the longest of its train and test texts.

    Args:
        input_ids: int64 (n, T), pad id after each text's end.
        lengths: int64 (n,), tokens of each text, special tokens included.
        labels: int64 (n,).
        first: int64 (n,), tokens of each pair's first segment; None where there are no segments.
    """

    input_ids: Ints
    lengths: Ints
    labels: Ints
    first: Ints | None = None

    def __len__(self) -> int:
        return len(self.labels)


def tokenise(data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, out: Path) -> TokenData:
    """Writes ``manifest.json``, ``tokens.arrow`` and ``examples.arrow`` to `out` and opens them.

    Texts are cut to `max_length` tokens, special tokens included; of a pair, the longer text is cut first. A text
    that has no token at all becomes one unknown (else end, else pad) token, so that no example is empty.

    Raises:
        ModelError: the tokenizer has no PAD token, its segments are not two in a row, or max_length leaves no room
            beside special tokens.
    """
    check(tokenizer, max_length, data.paired)
    out.mkdir(parents=True, exist_ok=True)
    lengths: list[int] = []
    digest = hashlib.sha256(data.hash.encode())
    segments = data.paired and "token_type_ids" in tokenizer.model_input_names
    rows = _batches(data, tokenizer, max_length, lengths, digest)
    write_stream(out / "tokens.arrow", SEGMENTS if segments else TOKENS, rows)
    copyfile(data.path / "examples.arrow", out / "examples.arrow")
    manifest = {
        "labels": list(data.labels),
        "pad_id": int(tokenizer.pad_token_id),
        "max_length": max_length,
        "data_hash": data.hash,
        "hash": digest.hexdigest(),
        "rows": len(lengths),
        "clients": _client_entries(data, np.array(lengths, dtype=np.int64)),
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return TokenData.open(out)


def examples_of(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, labels: Ints, max_length: int
) -> Examples:
    """Tokenises texts that are in memory, by the rules of `tokenise`.

    Args:
        tokenizer: of the base model.
        texts: n texts, or the first texts of n pairs.
        pairs: the n second texts; None for single texts.
        labels: (n,) class indices.
        max_length: most tokens of a text or pair, special tokens included.

    Raises:
        ModelError: see `tokenise`.
    """
    check(tokenizer, max_length, pairs is not None)
    ids, first = encode(tokenizer, texts, pairs, max_length)
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    input_ids = np.full((len(ids), int(lengths.max(initial=0))), tokenizer.pad_token_id, dtype=np.int64)
    for row, target in zip(ids, input_ids, strict=True):
        target[: len(row)] = row
    return Examples(input_ids, lengths, labels.astype(np.int64), None if first is None else first.astype(np.int64))


def _batches(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, lengths: list[int], digest: Any
) -> Iterator[pa.RecordBatch]:
    for batch in data.batches:
        pairs = batch.column("pair").to_pylist() if data.paired else None
        ids, first = encode(tokenizer, batch.column("text").to_pylist(), pairs, max_length)
        lengths.extend(map(len, ids))
        for row in ids:
            digest.update(len(row).to_bytes(4, "little") + row.tobytes())
        columns = [pa.array(ids, TOKENS.field("ids").type), batch.column("label")]
        if first is None:
            yield pa.record_batch(columns, schema=TOKENS)
        else:
            digest.update(first.tobytes())
            yield pa.record_batch([*columns, pa.array(first)], schema=SEGMENTS)


def _client_entries(data: TaskData, lengths: Ints) -> list[dict[str, Any]]:
    entries = []
    for c in data.clients:
        rows = [lengths[data.members.rows_of(c.id, split)] for split in ("train", "test")]
        entry = {"id": c.id, "n_train": c.n_train, "n_test": c.n_test}
        entry |= {"longest": int(max(r.max() for r in rows)), "train_tokens": int(rows[0].sum())}
        entries.append(entry)
    return entries


@dataclass(frozen=True)
class TokenData:
    """Tokenised clients, opened read-only through memory maps; cheap enough for every worker."""

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)
    members: Membership = field(repr=False)
    batches: tuple[tuple[Ints, Ids, Ids, Ids | None], ...] = field(repr=False)
    """(offsets, ids, labels, tokens of the first segments) of each block."""

    @classmethod
    def open(cls, path: Path | str) -> TokenData:
        """Opens a folder that `tokenise` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path / "manifest.json")
        members = Membership.open(path, clients_of(manifest))
        blocks = []
        for batch in open_stream(path / "tokens.arrow", manifest["rows"]):
            ids, label = batch.column("ids"), batch.column("label")
            first = batch.column("first").to_numpy() if "first" in batch.schema.names else None
            blocks.append((ids.offsets.to_numpy(), ids.values.to_numpy(), label.to_numpy(), first))
        return cls(path, manifest, members, tuple(blocks))

    @property
    def clients(self) -> tuple[Client, ...]:
        """All clients by (pool, language, index)."""
        return self.members.clients

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names."""
        return tuple(self.manifest["labels"])

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.manifest["labels"])

    @property
    def pad_id(self) -> int:
        """Token id that fills rows."""
        return int(self.manifest["pad_id"])

    @property
    def hash(self) -> str:
        """sha256 over the task's hash and all token ids."""
        return str(self.manifest["hash"])

    def pool(self, name: str) -> tuple[Client, ...]:
        """The clients of one pool."""
        return tuple(client for client in self.clients if client.pool == name)

    def client(self, client_id: str) -> Client:
        """The client of this id."""
        return self.members.client(client_id)

    def longest(self, client_id: str) -> int:
        """Tokens of the client's longest text in train and test, the T of its `Examples`."""
        self.members.client(client_id)
        return int(self.manifest["clients"][self.members.index[client_id]]["longest"])

    def train_tokens(self, client_id: str) -> int:
        """Real tokens of the client's train texts, a measure of its cost."""
        self.members.client(client_id)
        return int(self.manifest["clients"][self.members.index[client_id]]["train_tokens"])

    def examples(self, client_id: str, split: Split) -> Examples:
        """The client's texts or pairs of one split as fresh, writable arrays."""
        rows = self.members.rows_of(client_id, split)
        input_ids = np.full((len(rows), self.longest(client_id)), self.pad_id, dtype=np.int64)
        lengths = np.empty(len(rows), dtype=np.int64)
        labels, first = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            offsets, ids, block_labels, block_first = self.batches[row // BLOCK]
            start, end = offsets[row % BLOCK], offsets[row % BLOCK + 1]
            input_ids[i, : end - start] = ids[start:end]
            lengths[i], labels[i] = end - start, block_labels[row % BLOCK]
            if block_first is not None:
                first[i] = block_first[row % BLOCK]
        segments = bool(self.batches) and self.batches[0][3] is not None
        return Examples(input_ids, lengths, labels, first if segments else None)
