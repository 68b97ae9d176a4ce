"""Batches over lanes: every lane brings its own rows, padded to the group's longest and widest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


class Examples(Protocol):
    """Tokenised texts or pairs of one client: ids (n, T) padded, lengths (n,), labels (n,), all int64."""

    @property
    def input_ids(self) -> IntArray:
        """Token ids (n, T)."""

    @property
    def lengths(self) -> IntArray:
        """Real tokens of each text (n,)."""

    @property
    def labels(self) -> IntArray:
        """Classes (n,)."""

    @property
    def first(self) -> IntArray | None:
        """Tokens of each pair's first segment (n,); None where there are no segments."""


@dataclass(frozen=True)
class LaneBatch:
    """One step of the first ``k`` lanes.

    Args:
        input_ids: (k, b, T) int64.
        attention_mask: (k, b, T) int64; rows that only pad keep one token, lest a softmax divide by zero.
        labels: (k, b) int64.
        rows: (k, b) bool, False where a lane has fewer than b rows.
        shapes: per lane its own (rows, tokens), without the group's padding.
        token_type_ids: (k, b, T) int64, 1 in the second segment of a pair, else 0 (padding too); None where
            no lane has pairs.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    rows: Tensor
    shapes: tuple[tuple[int, int], ...]
    token_type_ids: Tensor | None = None

    @property
    def lanes(self) -> int:
        """K."""
        return self.input_ids.shape[0]


def make_batch(
    examples: Sequence[Examples], picks: Sequence[IntArray], pad_id: int, device: torch.device | str = "cpu"
) -> LaneBatch:
    """Gathers rows ``picks[k]`` of ``examples[k]`` into one batch."""
    chosen = [e.lengths[p] for e, p in zip(examples, picks, strict=True)]
    shapes = tuple((len(p), int(c.max())) for p, c in zip(picks, chosen, strict=True))
    k, b, t = len(picks), max(s[0] for s in shapes), max(s[1] for s in shapes)
    ids = np.full((k, b, t), pad_id, dtype=np.int64)
    lengths = np.ones((k, b), dtype=np.int64)
    first = np.full((k, b), t, dtype=np.int64)
    labels = np.zeros((k, b), dtype=np.int64)
    rows = np.zeros((k, b), dtype=np.bool_)
    for lane, (e, pick, (n, width)) in enumerate(zip(examples, picks, shapes, strict=True)):
        ids[lane, :n, :width] = e.input_ids[pick, :width]
        lengths[lane, :n] = chosen[lane]
        labels[lane, :n] = e.labels[pick]
        rows[lane, :n] = True
        if e.first is not None:
            first[lane, :n] = e.first[pick]
    mask = (np.arange(t) < lengths[..., None]).astype(np.int64)
    tensors = [torch.from_numpy(array).to(device) for array in (ids, mask, labels, rows)]
    segments = None
    if any(e.first is not None for e in examples):
        segments = torch.from_numpy(mask * (np.arange(t) >= first[..., None])).to(device)
    return LaneBatch(tensors[0], tensors[1], tensors[2], tensors[3], shapes, segments)


def training_picks(size: int, epochs: int, batch_size: int, rngs: Sequence[np.random.Generator]) -> list[IntArray]:
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
    picks: Sequence[Sequence[IntArray]],
    pad_id: int,
    device: torch.device | str = "cpu",
) -> Iterator[LaneBatch]:
    """Runs all lanes side by side; a lane leaves when its steps are used up.

    Raises:
        ValueError: the lanes are not ordered by falling number of steps.
    """
    counts = [len(p) for p in picks]
    if counts != sorted(counts, reverse=True):
        raise ValueError(f"lanes must be ordered by falling number of steps, got {counts}")
    for step in range(counts[0] if counts else 0):
        k = sum(count > step for count in counts)
        yield make_batch(examples[:k], [picks[lane][step] for lane in range(k)], pad_id, device)
