"""Tokenised clients: each text or pair of the table is tokenised once; clients point to rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shutil import copyfile
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedtailor.lanes.batches import Examples
from fedtailor.tasks import templates
from fedtailor.tasks.encoding import check, check_pad, encode, write_instructions
from fedtailor.tasks.source import Split
from fedtailor.tasks.store import (
    BLOCK,
    ClientIndex,
    Partitioned,
    TaskData,
    cells,
    clients_of,
    kind_of,
    open_stream,
    read_manifest,
    write_stream,
)

Ints = npt.NDArray[np.int64]

Ids = npt.NDArray[np.int32]

TOKENS = pa.schema({"ids": pa.large_list(pa.int32()), "label": pa.int32()})
"""tokens.arrow: row i belongs to row i of texts.arrow."""

SEGMENTS = TOKENS.append(pa.field("first", pa.int32()))
"""tokens.arrow of pairs whose tokenizer tells segments apart: `first` tokens belong to the first one."""


def tokenise(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    out: Path,
    template: str = "auto",
    overlong: templates.Overlong = "cut_prompt",
) -> TokenData:
    """Writes ``manifest.json``, ``tokens.arrow`` and ``examples.arrow`` to `out` and opens them.

    Texts are cut to `max_length` tokens, special tokens included; of a pair, the longer text is cut first. A text
    that has no token at all becomes one unknown (else end, else pad) token, so that no example is empty.

    Instructions are written by `template`; those that are too long follow `overlong`, in train and test alike, and
    are counted in the manifest. ``answers.arrow`` keeps their texts.

    Raises:
        ModelError: the tokenizer has no PAD token, its segments are not two in a row, or max_length leaves no room
            beside special tokens or the template; see `templates.encode` for instructions, as for the next two.
        ConfigError: no such template.
        DataError: a client has only over-long examples, and these are dropped; names it.
    """
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data.hash.encode())
    if data.kind == "generation":
        made = write_instructions(data, tokenizer, max_length, out, template, overlong, digest)
        lengths, held, notes = made.lengths, made.held, made.notes
    else:
        check(tokenizer, max_length, data.paired)
        found: list[int] = []
        segments = data.paired and "token_type_ids" in tokenizer.model_input_names
        rows = _batches(data, tokenizer, max_length, found, digest)
        write_stream(out / "tokens.arrow", SEGMENTS if segments else TOKENS, rows)
        copyfile(data.path / "examples.arrow", out / "examples.arrow")
        lengths, notes = np.array(found, dtype=np.int64), {}
        held = [_held(data, client.id) for client in data.clients]
    manifest = notes | {
        "labels": list(data.labels),
        "pad_id": tokenizer.pad_token_id,
        "max_length": max_length,
        "data_hash": data.hash,
        "hash": digest.hexdigest(),
        "rows": len(lengths),
        "clients": [_client_entry(c.id, *rows, lengths) for c, rows in zip(data.clients, held, strict=True)],
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
    input_ids = _padded(ids, tokenizer)
    return Examples(input_ids, lengths, labels.astype(np.int64), None if first is None else first.astype(np.int64))


def instructions_of(
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[templates.Sample],
    labels: Ints,
    max_length: int,
    template: str = "auto",
) -> Examples:
    """Tokenises instructions that are in memory, by the rules of `tokenise`; what is too long is cut.

    Args:
        tokenizer: of the base model.
        samples: n instructions, with or without a response.
        labels: (n,) group indices.
        max_length: most tokens of prompt and response.
        template: see ``task.template``.

    Raises:
        ConfigError, ModelError, DataError: see `templates.encode`.
    """
    check_pad(tokenizer)
    rows = [row for row in templates.encode(template, tokenizer, samples, max_length) if row is not None]
    ids = [row.ids for row in rows]
    lengths = np.array([len(row) for row in ids], dtype=np.int64)
    prompt = np.array([row.prompt_tokens for row in rows], dtype=np.int64)
    return Examples(_padded(ids, tokenizer), lengths, labels.astype(np.int64), prompt_length=prompt)


def _padded(ids: Sequence[Ids], tokenizer: PreTrainedTokenizerBase) -> Ints:
    input_ids = np.full((len(ids), max(map(len, ids), default=0)), tokenizer.pad_token_id, dtype=np.int64)
    for row, target in zip(ids, input_ids, strict=True):
        target[: len(row)] = row
    return input_ids


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


def _held(data: TaskData, client: str) -> tuple[Ints, Ints]:
    return data.members.rows_of(client, "train"), data.members.rows_of(client, "test")


def _client_entry(client: str, train: Ints, test: Ints, lengths: Ints) -> dict[str, Any]:
    longest = int(max(lengths[train].max(), lengths[test].max()))
    sizes = {"id": client, "n_train": len(train), "n_test": len(test)}
    return sizes | {"longest": longest, "train_tokens": int(lengths[train].sum())}


@dataclass(frozen=True)
class TokenData(Partitioned):
    """Tokenised clients, opened read-only through memory maps; cheap enough for every worker."""

    batches: tuple[tuple[Ints, Ids, Ids, Ids | None], ...] = field(repr=False)
    """(offsets, ids, labels, tokens of the first segments or of the prompts) of each block."""
    texts: tuple[pa.RecordBatch, ...] = field(repr=False, default=())
    """Of instructions: question and answer of each row."""

    @classmethod
    def open(cls, path: Path | str) -> TokenData:
        """Opens a folder that `tokenise` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path / "manifest.json")
        members = ClientIndex.open(path, clients_of(manifest))
        blocks = []
        for batch in open_stream(path / "tokens.arrow", manifest["rows"]):
            ids, label = batch.column("ids"), batch.column("label")
            part = next((batch.column(n).to_numpy() for n in ("first", "prompt") if n in batch.schema.names), None)
            blocks.append((ids.offsets.to_numpy(), ids.values.to_numpy(), label.to_numpy(), part))
        texts = open_stream(path / "answers.arrow", manifest["rows"]) if kind_of(manifest) == "generation" else ()
        return cls(path, manifest, members, tuple(blocks), tuple(texts))

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.manifest["labels"])

    @property
    def pad_id(self) -> int:
        """Token id that fills rows."""
        return int(self.manifest["pad_id"])

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
        labels, part = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            offsets, ids, block_labels, block_part = self.batches[row // BLOCK]
            start, end = offsets[row % BLOCK], offsets[row % BLOCK + 1]
            input_ids[i, : end - start] = ids[start:end]
            lengths[i], labels[i] = end - start, block_labels[row % BLOCK]
            if block_part is not None:
                part[i] = block_part[row % BLOCK]
        if self.kind == "generation":
            return Examples(input_ids, lengths, labels, prompt_length=part)
        segments = bool(self.batches) and self.batches[0][3] is not None
        return Examples(input_ids, lengths, labels, part if segments else None)

    def answers(self, client_id: str, split: Split) -> list[str]:
        """The reference responses, in the order of `examples`; whole, even where tokens were cut."""
        return cells(self.texts, "answer", self.members.rows_of(client_id, split))

    def questions(self, client_id: str, split: Split) -> list[str]:
        """The instructions without template and history, in the order of `examples`."""
        return cells(self.texts, "question", self.members.rows_of(client_id, split))
