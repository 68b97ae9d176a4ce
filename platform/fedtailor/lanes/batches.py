"""Batches over lanes: every lane brings its own rows, padded to the group's longest and widest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """Tokenised texts, pairs or instructions of one client, padded to the longest.

    Args:
        input_ids: (n, T) int64, the pad id after each text's end.
        lengths: (n,) int64, tokens of each text, special tokens included.
        labels: (n,) int64, classes; of instructions their groups, see `tasks.source.Source`.
        first_segment_length: (n,) int64, tokens of each pair's first segment; None where there are no segments.
        prompt_length: (n,) int64, at least 1, tokens of each instruction's prompt: the rest is the response that is
            learned. None where texts are classified.
        spans: (n, 2) int64, first and last token of each text's answer, twice 0 (the token that begins a text) where
            there is none. None where nothing is to be found in a text.
    """

    input_ids: IntArray
    lengths: IntArray
    labels: IntArray
    first_segment_length: IntArray | None = None
    prompt_length: IntArray | None = None
    spans: IntArray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: IntArray | slice) -> Examples:
        """The examples at the indices (m,) or of the slice, in their order."""
        parts: list[Any] = [getattr(self, field.name) for field in fields(self)]
        taken: list[Any] = [None if part is None else part[index] for part in parts]
        return Examples(*taken)


@dataclass(frozen=True)
class LaneBatch:
    """One step of the first ``k`` lanes.

    What is learned are m targets per lane, each a class. Of texts these are the rows: m = b, C classes. Of
    instructions they are the tokens of all responses, C the vocabulary: a response token is classified from the token
    before it. Of spans they are the first and the last token of each row's, m = 2 b, C the T tokens that either may be.
    Whatever works on targets works on all of them.

    Args:
        input_ids: (k, b, T) int64.
        attention_mask: (k, b, T) int64; rows that only fill a lane up have that of its first row, and its text.
        labels: (k, m) int64, the classes.
        valid: (k, m) bool, False where a lane has fewer than m targets.
        shapes: per lane its own (rows, tokens), without the group's padding.
        token_type_ids: (k, b, T) int64, 1 in the second segment of a pair, else 0 (padding too); None where
            no lane has pairs.
        positions: (k, m) int64 in [0, b T): from which token of its lane each target is predicted; None: equally many
            predictions per row, made by the model's own head.
        target_row: (k, m) int64, the row that each target belongs to; None: target i is row i.
        step_share: (k,) this part's share of the targets of a step that was cut into parts; None: it is whole.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    valid: Tensor
    shapes: tuple[tuple[int, int], ...]
    token_type_ids: Tensor | None = None
    positions: Tensor | None = None
    target_row: Tensor | None = None
    step_share: Tensor | None = None

    @property
    def lanes(self) -> int:
        """K."""
        return self.input_ids.shape[0]

    def lane(self, number: int) -> LaneBatch:
        """One lane of the batch, padded as it is."""
        own, values = slice(number, number + 1), {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: None if value is None else value[own] for name, value in values.items()}
        return LaneBatch(**taken)


def make_batch(
    examples: Sequence[Examples], indices: Sequence[IntArray], pad_id: int, device: torch.device | str = "cpu"
) -> LaneBatch:
    """Gathers rows ``indices[k]`` of ``examples[k]`` into one batch."""
    chosen = [e.lengths[p] for e, p in zip(examples, indices, strict=True)]
    shapes = tuple((len(p), int(c.max())) for p, c in zip(indices, chosen, strict=True))
    k, b, t = len(indices), max(s[0] for s in shapes), max(s[1] for s in shapes)
    ids = np.full((k, b, t), pad_id, dtype=np.int64)
    lengths = np.ones((k, b), dtype=np.int64)
    first = np.full((k, b), t, dtype=np.int64)
    labels = np.zeros((k, b), dtype=np.int64)
    valid = np.zeros((k, b), dtype=np.bool_)
    for lane, (e, index, (n, width)) in enumerate(zip(examples, indices, shapes, strict=True)):
        ids[lane, :n, :width] = e.input_ids[index, :width]
        # Rows that only fill a lane up are its first text again: some models refuse a row without an end token.
        ids[lane, n:] = ids[lane, 0]
        lengths[lane, :n], lengths[lane, n:] = chosen[lane], chosen[lane][0]
        labels[lane, :n] = e.labels[index]
        valid[lane, :n] = True
        if e.first_segment_length is not None:
            first[lane, :n] = e.first_segment_length[index]
    mask = (np.arange(t) < lengths[..., None]).astype(np.int64)
    tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, labels, valid)]
    segments = None
    if any(e.first_segment_length is not None for e in examples):
        segments = torch.from_numpy(mask * (np.arange(t) >= first[..., None])).to(device)
    batch = LaneBatch(tensors[0], tensors[1], tensors[2], tensors[3], shapes, segments)
    if examples[0].spans is not None:
        return _with_spans(batch, examples, indices)
    return batch if examples[0].prompt_length is None else _with_responses(batch, examples, indices, ids, lengths)


def _with_spans(batch: LaneBatch, examples: Sequence[Examples], indices: Sequence[IntArray]) -> LaneBatch:
    """The batch with every row's first and last token as its targets, in this order, row by row."""
    k, b = batch.labels.shape
    labels = np.zeros((k, b, 2), dtype=np.int64)
    for lane, (e, index) in enumerate(zip(examples, indices, strict=True)):
        assert e.spans is not None
        labels[lane, : len(index)] = e.spans[index]
    rows = torch.arange(b, device=batch.labels.device).expand(k, b)
    valid, rows = (each.repeat_interleave(2, 1) for each in (batch.valid, rows))
    return replace(batch, labels=torch.from_numpy(labels).to(rows.device).flatten(1), valid=valid, target_row=rows)


def _with_responses(
    batch: LaneBatch, examples: Sequence[Examples], indices: Sequence[IntArray], ids: IntArray, lengths: IntArray
) -> LaneBatch:
    """The batch with every response token as a target, row by row."""
    k, _, t = ids.shape
    found: list[tuple[IntArray, IntArray]] = []
    for lane, (e, index) in enumerate(zip(examples, indices, strict=True)):
        assert e.prompt_length is not None
        starts, ends = e.prompt_length[index], lengths[lane, : len(index)]
        counts = ends - starts
        row = np.repeat(np.arange(len(index)), counts)
        column = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
        found.append((row, column))
    m = max(len(row) for row, _ in found)
    labels, target_row, positions = (np.zeros((k, m), dtype=np.int64) for _ in range(3))
    valid = np.zeros((k, m), dtype=np.bool_)
    for lane, (row, column) in enumerate(found):
        n = len(row)
        labels[lane, :n] = ids[lane, row, column]
        positions[lane, :n] = row * t + column - 1
        target_row[lane, :n], valid[lane, :n] = row, True
    at = batch.input_ids.device
    labels_, valid_, positions_, rows_ = (torch.from_numpy(x).to(at) for x in (labels, valid, positions, target_row))
    return replace(batch, labels=labels_, valid=valid_, positions=positions_, target_row=rows_)


def prompt_lengths(batch: LaneBatch) -> Tensor:
    """Tokens of each row's prompt, (k, b) int64: what comes before its first target. T of rows without any."""
    assert batch.positions is not None
    assert batch.target_row is not None
    k, b, t = batch.input_ids.shape
    ends = torch.where(batch.valid, batch.positions - batch.target_row * t + 1, t)
    return torch.full((k, b), t, device=ends.device).scatter_reduce_(1, batch.target_row, ends, "amin")


def scoring_batches(
    texts: Sequence[Examples], pad_id: int, token_budget: int, device: torch.device | str
) -> Iterator[tuple[LaneBatch, list[IntArray]]]:
    """All texts of every lane once: long ones first, side by side, so that there is little padding, the largest first.

    Lanes are ordered by training size, so any of them may run out of texts first: it stays in the batch with its
    shortest text, which is not counted again.

    Args:
        texts: one set of examples per lane.
        pad_id: padding token.
        token_budget: tokens of one batch over all lanes.
        device: where batches go.

    Yields:
        A batch, and of each lane the rows of it that count, (n,), none where it has run out.
    """
    order = [np.argsort(-t.lengths, kind="stable") for t in texts]
    start = 0
    while start < max(map(len, order)):
        width = max(int(t.lengths[own[start]]) for t, own in zip(texts, order, strict=True) if start < len(own))
        stop = start + max(1, token_budget // (len(texts) * width))
        indices = [own[start:stop] if start < len(own) else own[-1:] for own in order]
        yield make_batch(texts, indices, pad_id, device), [own[start:stop] for own in order]
        start = stop


def training_indices(size: int, epochs: int, batch_size: int, rngs: Sequence[np.random.Generator]) -> list[IntArray]:
    """Row numbers of every step: each epoch a fresh permutation, its last batch possibly smaller.

    Args:
        size: number of examples.
        epochs: passes over them.
        batch_size: rows of a step.
        rngs: one generator per epoch.
    """
    steps = []
    for epoch in range(epochs):
        order = rngs[epoch].permutation(size)
        steps += [order[i : i + batch_size] for i in range(0, size, batch_size)]
    return steps


def lane_batches(
    examples: Sequence[Examples],
    indices: Sequence[Sequence[IntArray]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Iterator[LaneBatch]:
    """Runs all lanes side by side; a lane leaves when its steps are used up.

    Raises:
        ValueError: the lanes are not ordered by falling number of steps.
    """
    counts = [len(p) for p in indices]
    if counts != sorted(counts, reverse=True):
        raise ValueError(f"lanes must be ordered by falling number of steps, got {counts}")
    for step in range(counts[0] if counts else 0):
        k = sum(count > step for count in counts)
        yield make_batch(examples[:k], [indices[lane][step] for lane in range(k)], pad_id, device)
