"""Texts, pairs and instructions to token ids on disk, by the tokenizer's own rules.

Of instructions are kept: prompt and response of each row as tokens, which client has which of the rows that are left,
and the plain texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError, ModelError
from fedtailor.tasks.prompts import identity, resolve
from fedtailor.tasks.source import SPLITS
from fedtailor.tasks.store import BLOCK, EXAMPLES, TaskData, write_stream
from fedtailor.tasks.templates import Encoded, Encoder, Overlong, Sample

Ids = npt.NDArray[np.int32]


Ints = npt.NDArray[np.int64]

PROMPTS = pa.schema({"ids": pa.large_list(pa.int32()), "label": pa.int32(), "prompt": pa.int32()})
"""tokens.arrow of instructions: the first `prompt` tokens are given, the others learned; no tokens: dropped."""

ANSWERS = pa.schema({"question": pa.large_string(), "answer": pa.large_string()})
"""answers.arrow: row i is row i of texts.arrow, as it was before any cut."""


def check(tokenizer: PreTrainedTokenizerBase, max_length: int, paired: bool) -> None:
    """Checks that a tokenizer can serve.

    Raises:
        ModelError: it has no PAD token, or max_length leaves no room beside special tokens.
    """
    check_pad(tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= special:
        raise ModelError(
            f"'task.max_length' is {max_length}, but the tokenizer adds {special} special tokens to a "
            f"{'pair' if paired else 'text'}"
        )


def check_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that batches can be padded.

    Raises:
        ModelError: the tokenizer has no PAD token.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no PAD token; set one before tokenising")


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[list[Ids], Ids | None]:
    """Tokens of texts or pairs, cut to `max_length`; of a pair, the longer text is cut first.

    Returns:
        Ids of each text, int32 (length,) each; tokens of each pair's first segment, int32 (n,), or None for single
        texts and for tokenizers that do not tell segments apart.

    Raises:
        ModelError: the tokenizer's segments are not two in a row.
    """
    if not len(texts):
        return [], None
    segments = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    encoded = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation="longest_first",
        max_length=max_length,
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=segments,
    )
    candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    spare = next(token for token in candidates if token is not None)
    ids = [np.array(row or [spare], dtype=np.int32) for row in encoded["input_ids"]]
    if not segments:
        return ids, None
    return ids, np.array([_first(tokenizer, row) for row in encoded["token_type_ids"]], dtype=np.int32)


def _first(tokenizer: PreTrainedTokenizerBase, types: Sequence[int]) -> int:
    """Tokens of the first segment: types must be 0, ..., 0, 1, ..., 1."""
    count = sum(kind == 0 for kind in types)
    if list(types) != [0] * count + [1] * (len(types) - count):
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} marks the segments of a pair by {sorted(set(types))}; "
            "only zeros followed by ones are supported"
        )
    return count or 1


@dataclass(frozen=True)
class Written:
    """What `write` found out.

    Args:
        lengths: (rows,) int64, tokens of each row; 0: dropped.
        held: per client its (train, test) rows that are left.
        notes: entries for the manifest.
    """

    lengths: Ints
    held: list[tuple[Ints, Ints]]
    notes: dict[str, Any]


def write_instructions(
    data: TaskData,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    out: Path,
    template: str,
    overlong: Overlong,
    digest: Any,
) -> Written:
    """Writes ``tokens.arrow``, ``answers.arrow`` and ``examples.arrow``; feeds `digest` with all ids.

    Raises:
        ConfigError, ModelError: see `templates.encode`; the tokenizer has no PAD token.
        DataError: a client has only over-long train or test examples, and these are dropped; names it.
    """
    check_pad(tokenizer)
    encoder = Encoder.of(template, tokenizer, max_length, overlong)
    encoder.check_room()
    marks: list[tuple[int, bool, bool]] = []
    write_stream(out / "tokens.arrow", PROMPTS, _batches(data, encoder, marks, digest))
    write_stream(out / "answers.arrow", ANSWERS, _answers(data))
    lengths, prompts, responses = (np.array(column) for column in zip(*marks, strict=True))
    held = [_kept(data, client.id, lengths, max_length) for client in data.clients]
    write_stream(out / "examples.arrow", EXAMPLES, _example_batches(held))
    counts: dict[str, dict[str, int]] = {}
    for at, split in enumerate(SPLITS):
        rows = np.concatenate([pair[at] for pair in held])
        before = sum((client.n_train, client.n_test)[at] for client in data.clients)
        found = {"cut_prompts": prompts[rows].sum(), "cut_responses": responses[rows].sum()}
        counts[split] = {name: int(n) for name, n in found.items()} | {"dropped": before - len(rows)}
    chosen = resolve(template, tokenizer)
    notes: dict[str, Any] = {
        "kind": "generation",
        "template": identity(chosen),
        "overlong": {"rule": overlong, **counts},
    }
    notes["stop_ids"] = sorted({encoder.closing[-1], tokenizer.eos_token_id} - {None})
    notes["closing"] = [int(token) for token in encoder.closing]
    return Written(lengths.astype(np.int64), held, notes)


def samples_of(batch: pa.RecordBatch) -> list[Sample]:
    """The rows of a block of texts.arrow."""
    texts, responses = batch.column("text").to_pylist(), batch.column("pair").to_pylist()
    has_history = "history" in batch.schema.names
    histories = batch.column("history").to_pylist() if has_history else [None] * len(texts)
    return [
        Sample(text, response, tuple(json.loads(history)) if history else ())
        for text, response, history in zip(texts, responses, histories, strict=True)
    ]


def _batches(
    data: TaskData, encoder: Encoder, marks: list[tuple[int, bool, bool]], digest: Any
) -> Iterator[pa.RecordBatch]:
    empty = Encoded(np.empty(0, dtype=np.int32), 0)
    for batch in data.batches:
        rows = [row or empty for row in encoder.encode(samples_of(batch))]
        for row in rows:
            head = len(row.ids).to_bytes(4, "little") + row.prompt_tokens.to_bytes(4, "little")
            digest.update(head + row.ids.tobytes())
            marks.append((len(row.ids), "prompt" in row.cut, "response" in row.cut))
        ids = pa.array([row.ids for row in rows], PROMPTS.field("ids").type)
        prompts = pa.array([row.prompt_tokens for row in rows], pa.int32())
        yield pa.record_batch([ids, batch.column("label"), prompts], schema=PROMPTS)


def _answers(data: TaskData) -> Iterator[pa.RecordBatch]:
    for batch in data.batches:
        yield pa.record_batch([batch.column("text"), batch.column("pair")], schema=ANSWERS)


def _kept(data: TaskData, client: str, lengths: Ints, max_length: int) -> tuple[Ints, Ints]:
    train, test = (data.members.rows_of(client, split) for split in SPLITS)
    for split, rows in zip(SPLITS, (train, test), strict=True):
        if len(rows) and not lengths[rows].any():
            raise DataError(
                f"client {client!r}: all {len(rows)} {split} examples exceed 'task.max_length' = {max_length} tokens "
                "and 'task.overlong' is 'drop'; raise max_length, or set task.overlong=cut_prompt"
            )
    return train[lengths[train] > 0], test[lengths[test] > 0]


def _example_batches(held: Sequence[tuple[Ints, Ints]]) -> Iterator[pa.RecordBatch]:
    rows = np.concatenate([part for pair in held for part in pair]).astype(np.int32)
    sizes = np.array([(len(train), len(test)) for train, test in held])
    clients = np.repeat(np.arange(len(held), dtype=np.int32), sizes.sum(axis=1))
    test = np.repeat(np.tile([False, True], len(held)), sizes.ravel())
    for at in range(0, len(rows), BLOCK):
        cut = slice(at, at + BLOCK)
        yield pa.record_batch([clients[cut], test[cut], rows[cut]], schema=EXAMPLES)
