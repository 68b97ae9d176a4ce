"""Tokenised clients: each text or pair of the table is tokenised once; clients point to rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError
from fedtailor.lanes.batches import Examples
from fedtailor.tasks.encoding import Encoded, Encoder, Overlong, Sample, check_texts, encode_texts
from fedtailor.tasks.prompts import PromptTemplate, identity, resolve
from fedtailor.tasks.source import SPLITS, Example, Split
from fedtailor.tasks.store import (
    BLOCK,
    POOLED,
    Partitioned,
    TaskData,
    cells,
    examples_of,
    open_stream,
    write_answers,
    write_examples,
    write_stream,
)
from fedtailor.tasks.validation import pool_notes
from fedtailor.tasks.windows import PlaceOf, Question, WindowTable, Writer

Ints = npt.NDArray[np.int64]
Ids = npt.NDArray[np.int32]
TOKENS = pa.schema({"ids": pa.large_list(pa.int32()), "label": pa.int32()})
"""tokens.arrow: row i belongs to row i of texts.arrow."""

SEGMENTS = TOKENS.append(pa.field("first", pa.int32()))
"""tokens.arrow of pairs whose tokenizer tells segments apart: `first` tokens belong to the first one."""

PROMPTS = TOKENS.append(pa.field("prompt", pa.int32()))
"""tokens.arrow of instructions: the first `prompt` tokens are given, the others learned; no tokens: dropped."""


def tokenise(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    out: Path,
    template: str = "auto",
    overlong: Overlong = "cut_prompt",
    place_of: PlaceOf | None = None,
    stride: int = 128,
) -> TokenData:
    """Writes ``manifest.json``, ``tokens.arrow`` and ``examples.arrow`` to `out` and opens them.

    Texts are cut to `max_length` tokens, special tokens included; of a pair, the longer text is cut first. A text
    that has no token at all becomes one unknown (else end, else pad) token, so that no example is empty.

    Instructions are written by `template`; those that are too long follow `overlong`, in train and test alike, and
    are counted in the manifest. ``answers.arrow`` keeps their texts. `place_of` says for messages where an example is.

    Of extraction a row is a window of a question's context, which shares `stride` tokens with the next; see `windows`.

    Raises:
        ModelError: the tokenizer's segments are not two in a row, or max_length leaves no room
            beside special tokens or the template; see `encoding.Encoder` for instructions, as for the next two.
        ConfigError: no such template.
        DataError: a client has only over-long examples, and these are dropped; names it. See `check_conversations` and
            `windows.Writer`.
    """
    out.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(data.hash.encode())
    held = [[data.rows_of(client.id, split) for split in SPLITS] for client in data.clients]
    notes: dict[str, Any] = {}
    if data.kind == "generation":
        encoder = Encoder(template, tokenizer, max_length, overlong)
        encoded: list[tuple[int, bool, bool]] = []
        try:
            write_stream(out / "tokens.arrow", PROMPTS, _prompt_batches(data, encoder, encoded, digest))
        except DataError:
            check_conversations(data, encoder.template, place_of)
            raise
        write_answers(out / "answers.arrow", data)
        lengths, prompts, responses = (np.array(column) for column in zip(*encoded, strict=True))
        kept = [_kept(client.id, rows, lengths, max_length) for client, rows in zip(data.clients, held, strict=True)]
        counts: dict[str, dict[str, int]] = {}
        for at, split in enumerate(SPLITS):
            before, rows = (np.concatenate([parts[at] for parts in each]) for each in (held, kept))
            cut = {"cut_prompts": int(prompts[rows].sum()), "cut_responses": int(responses[rows].sum())}
            counts[split] = cut | {"dropped": len(before) - len(rows)}
        held = kept
        notes |= {key: data.manifest[key] for key in ("several", "label_answers") if key in data.manifest}
        notes["kind"], notes["template"] = "generation", identity(resolve(template, tokenizer))
        notes["overlong"] = {"rule": overlong, **counts}
        notes["stop_ids"] = sorted({encoder.closing[-1], tokenizer.eos_token_id} - {None})
        notes["closing"] = [int(token) for token in encoder.closing]
    elif data.kind == "extraction":
        writer = Writer(data, tokenizer, max_length, stride, place_of)
        schema = SEGMENTS if "token_type_ids" in tokenizer.model_input_names else TOKENS
        write_stream(out / "tokens.arrow", schema, writer.batches(schema, digest))
        lengths, held = writer.write(out, held)
        notes |= writer.notes
    else:
        check_texts(tokenizer, max_length, data.paired)
        found: list[int] = []
        segments = data.paired and "token_type_ids" in tokenizer.model_input_names
        batches = _text_batches(data, tokenizer, max_length, found, digest)
        write_stream(out / "tokens.arrow", SEGMENTS if segments else TOKENS, batches)
        lengths = np.array(found, dtype=np.int64)
        notes |= {} if data.score == "accuracy" else {"score": data.score}
        notes |= {key: data.manifest[key] for key in ("kind", "truth") if key in data.manifest}
    write_examples(out / "examples.arrow", held)
    notes |= pool_notes(data.manifest, lengths, [rows[0] for rows in held])
    manifest = notes | {
        "labels": list(data.labels),
        "pad_id": tokenizer.pad_token_id,
        "max_length": max_length,
        "data_hash": data.hash,
        "hash": digest.hexdigest(),
        "rows": len(lengths),
        "clients": [_client_entry(c.id, rows, lengths) for c, rows in zip(data.clients, held, strict=True)],
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return TokenData.open(out)


def _text_batches(
    data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, lengths: list[int], digest: Any
) -> Iterator[pa.RecordBatch]:
    for batch in data.batches:
        pairs = batch.column("pair").to_pylist() if data.paired else None
        ids, first = encode_texts(tokenizer, batch.column("text").to_pylist(), pairs, max_length)
        lengths.extend(map(len, ids))
        for row in ids:
            digest.update(len(row).to_bytes(4, "little") + row.tobytes())
        columns = [pa.array(ids, TOKENS.field("ids").type), batch.column("label")]
        if first is None:
            yield pa.record_batch(columns, schema=TOKENS)
        else:
            digest.update(first.tobytes())
            yield pa.record_batch([*columns, pa.array(first)], schema=SEGMENTS)


def _prompt_batches(
    data: TaskData, encoder: Encoder, encoded: list[tuple[int, bool, bool]], digest: Any
) -> Iterator[pa.RecordBatch]:
    """Blocks of tokens; appends to `encoded` the tokens of each row, and whether its prompt and response were cut."""
    dropped = Encoded(np.empty(0, dtype=np.int32), 0)
    for batch in data.batches:
        rows = [row or dropped for row in encoder.encode([_sample(example) for example in examples_of(batch)])]
        for row in rows:
            head = len(row.ids).to_bytes(4, "little") + row.prompt_tokens.to_bytes(4, "little")
            digest.update(head + row.ids.tobytes())
            encoded.append((len(row.ids), "prompt" in row.cut, "response" in row.cut))
        ids = pa.array([row.ids for row in rows], PROMPTS.field("ids").type)
        prompts = pa.array([row.prompt_tokens for row in rows], pa.int32())
        yield pa.record_batch([ids, batch.column("label"), prompts], schema=PROMPTS)


def check_conversations(data: TaskData, template: PromptTemplate, place_of: PlaceOf | None = None) -> None:
    """Checks that a template takes every instruction with the turns before it.

    Raises:
        DataError: it refuses some; says why, how many, the place and client of the first, and what to do.
    """
    refused: dict[int, tuple[Example, str]] = {}
    for number, batch in enumerate(data.batches):
        for row, example in enumerate(examples_of(batch), start=number * BLOCK):
            instruction, _, history = _sample(example)
            try:
                template.prompt(instruction, history)
            except DataError as error:
                refused[row] = example, str(error)
    if not refused:
        return
    first, (example, reason) = next(iter(refused.items()))
    owners = (c.id for c in data.clients if any(first in data.rows_of(c.id, split) for split in SPLITS))
    where = [*filter(None, [place_of(example) if place_of else ""]), f"client {next(owners, '')!r}"]
    raise DataError(
        f"{', '.join(where)}: {reason.rstrip('.')}. {len(refused)} of {data.manifest['rows']} examples are refused; "
        "use task.template=alpaca, which takes any conversation, or change these in the data"
    )


def _sample(example: Example) -> Sample:
    return Sample(example.text, example.pair, tuple(json.loads(example.history)) if example.history else ())


def _kept(client: str, rows: Sequence[Ints], lengths: Ints, max_length: int) -> list[Ints]:
    """A client's train and test rows without those that were dropped."""
    for split, part in zip(SPLITS, rows, strict=True):
        if len(part) and not lengths[part].any():
            raise DataError(
                f"client {client!r}: all {len(part)} {split} examples exceed 'task.max_length' = {max_length} tokens "
                "and 'task.overlong' is 'drop'; raise max_length, or set task.overlong=cut_prompt"
            )
    return [part[lengths[part] > 0] for part in rows]


def _client_entry(client: str, rows: Sequence[Ints], lengths: Ints) -> dict[str, Any]:
    train, test = (lengths[part] for part in rows)
    longest, train_tokens = int(max(train.max(), test.max())), int(train.sum())
    return {"id": client, "n_train": len(train), "n_test": len(test), "longest": longest, "train_tokens": train_tokens}


class TokenData(Partitioned):
    """Tokenised clients, opened read-only through memory maps; cheap enough for every worker."""

    def __init__(self, path: Path | str, pool_apart: bool = False) -> None:
        super().__init__(path, pool_apart)
        self.blocks: list[tuple[Ints, Ids, Ids, Ids | None]] = []
        """(offsets, ids, labels, tokens of the first segments or of the prompts) of each block."""
        for batch in open_stream(self.path / "tokens.arrow", self.manifest["rows"]):
            ids, label = batch.column("ids"), batch.column("label")
            part = next((batch.column(n).to_numpy() for n in ("first", "prompt") if n in batch.schema.names), None)
            self.blocks.append((ids.offsets.to_numpy(), ids.values.to_numpy(), label.to_numpy(), part))
        self._texts: list[pa.RecordBatch] = []
        if self.kind == "generation":
            self._texts = open_stream(self.path / "answers.arrow", self.manifest["rows"])
        self._windows: WindowTable | None = None
        if self.kind == "extraction":
            self._windows = WindowTable(self.path, self.manifest["rows"], self.manifest["questions"])

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
        whose = [c.id for c in self.pool("seen")] if client_id == POOLED else [client_id]
        return max(int(self.entry(client)["longest"]) for client in whose)

    def class_counts(self) -> tuple[int, ...]:
        """Training texts of each class, of all seen clients together, (C,)."""
        rows = self.rows_of(POOLED, "train") if self.pool("seen") else np.empty(0, np.int64)
        labels = np.concatenate([block[2] for block in self.blocks])
        return tuple(np.bincount(labels[rows], minlength=self.num_labels).tolist())

    def examples(self, client_id: str, split: Split) -> Examples:
        """The client's texts or pairs of one split as fresh, writable arrays."""
        return self._examples(self.rows_of(client_id, split), self.longest(client_id))

    @cached_property
    def validation(self) -> Examples | None:
        """The validation pool, by class and then by row; None where there is none, or it is not apart."""
        return self._examples(self._apart, self.longest(POOLED)) if len(self._apart) else None

    def _examples(self, rows: Ints, longest: int) -> Examples:
        column = np.arange(longest)
        input_ids = np.full((len(rows), len(column)), self.pad_id, dtype=np.int64)
        lengths = np.empty(len(rows), dtype=np.int64)
        labels, part = np.empty(len(rows), dtype=np.int64), np.empty(len(rows), dtype=np.int64)
        for number in np.unique(rows // BLOCK):
            mine = np.flatnonzero(rows // BLOCK == number)
            inside, (offsets, ids, block_labels, block_part) = rows[mine] % BLOCK, self.blocks[number]
            start, lengths[mine], labels[mine] = offsets[inside], np.diff(offsets)[inside], block_labels[inside]
            row, token = np.nonzero(column < lengths[mine][:, None])
            input_ids[mine[row], token] = ids[start[row] + token]
            if block_part is not None:
                part[mine] = block_part[inside]
        if self.kind == "generation":
            return Examples(input_ids, lengths, labels, prompt_length=part)
        segments = bool(self.blocks) and self.blocks[0][3] is not None
        spans = None if self._windows is None else self._windows.spans(rows)
        return Examples(input_ids, lengths, labels, part if segments else None, spans=spans)

    def texts_of(self, rows: Ints) -> Ints:
        """Rows of texts.arrow that rows of tokens are of: the same, but of windows their questions'."""
        return rows if self._windows is None else self._windows.question[rows]

    def asked(self, client_id: str) -> list[Question]:
        """A client's test questions of extraction, with their windows among its test rows."""
        assert self._windows is not None
        return self._windows.questions(self.rows_of(client_id, "test"))

    def answers(self, client_id: str, split: Split) -> list[str]:
        """The reference responses, in the order of `examples`; whole, even where tokens were cut."""
        return cells(self._texts, "answer", self.rows_of(client_id, split))

    def references(self, client_id: str, split: Split) -> list[tuple[str, ...]]:
        """All right responses of each example, that of `answers` first."""
        rows = self.rows_of(client_id, split)
        others = cells(self._texts, "others", rows) if self.several else [()] * len(rows)
        return [(first, *more) for first, more in zip(self.answers(client_id, split), others, strict=True)]

    def questions(self, client_id: str, split: Split) -> list[str]:
        """The instructions without template and history, in the order of `examples`."""
        return cells(self._texts, "question", self.rows_of(client_id, split))
