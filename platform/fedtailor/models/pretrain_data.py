"""What a base may learn from: every train text of the named tasks and no test text, as rows of tokens, and counts.

Token vectors to start from are counted, since a short pretraining cannot learn which words go together: positive
pointwise mutual information of tokens within a window, context counts ** 0.75, factorised by a truncated SVD (Levy,
Goldberg and Dagan, TACL 2015, sections 2 and 3): rows of U sqrt(S).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from scipy.sparse import coo_array, csr_array
from sklearn.utils.extmath import randomized_svd
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError, StorageError
from fedtailor.core.seeding import numpy_rng, seed_for
from fedtailor.models.load import quiet
from fedtailor.tasks.source import Example, Source, normalise
from fedtailor.tasks.task import TASKS, task_config

Document = tuple[str, ...]
"""Texts that belong together: an article, or a premise and its hypotheses."""

Rows = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
WINDOW = 5
SMOOTHING = 0.75


@dataclass(frozen=True)
class Corpus:
    """Documents by stream (``task/language``), and what was left out.

    Args:
        train: documents to learn from, in seeded order.
        held_out: documents to measure on, in seeded order.
        dropped_test: train texts that are also a test text of a named task, left out.
        dropped_repeated: texts that stand twice in a stream, the second left out.
    """

    train: Mapping[str, Sequence[Document]]
    held_out: Mapping[str, Sequence[Document]]
    dropped_test: int
    dropped_repeated: int

    @property
    def sha256(self) -> str:
        """Of all documents with their streams, train before held-out."""
        total = hashlib.sha256()
        streams = (stream for part in (self.train, self.held_out) for stream in part.items())
        for document in ((name, *document) for name, documents in streams for document in documents):
            total.update("\0".join(document).encode() + b"\1")
        return total.hexdigest()

    def describe(self) -> dict[str, Any]:
        """Counts for ``pretrain.json``."""
        return {
            "sha256": self.sha256,
            "texts": sum(len(d) for part in (self.train, self.held_out) for docs in part.values() for d in docs),
            "dropped_test": self.dropped_test,
            "dropped_repeated": self.dropped_repeated,
        }


def gather(tasks: Sequence[str], held_out: float, seed: int) -> Corpus:
    """Loads the tasks and takes both pools' train parts together, so that nearly nothing depends on the seed.

    Args:
        tasks: names in `TASKS`, each with all its languages.
        held_out: share of each stream's documents; at least one, if the stream has two.
        seed: of the documents' order and so of which are held out.

    Raises:
        DataError: a task's files are missing or damaged, or there is no text.
    """
    # Pools without bounds: both together are the whole train part.
    whole = dict.fromkeys(("train_per_pool", "test_per_pool"), 2**31 - 1)
    sources = {name: TASKS[name].load(task_config(name, **whole), seed) for name in tasks}
    tests = (e for source in sources.values() for _, _, part in source.parts() for e in part.test)
    forbidden = {normalise(text) for e in tests for text in (e.text, e.pair) if text is not None}
    train: dict[str, Sequence[Document]] = {}
    held: dict[str, Sequence[Document]] = {}
    dropped_test = dropped_repeated = 0
    for stream, examples in _streams(sources):
        documents, tested, repeated = _documents(examples, forbidden)
        dropped_test, dropped_repeated = dropped_test + tested, dropped_repeated + repeated
        order = numpy_rng(seed, "pretrain", "documents", stream).permutation(len(documents))
        shuffled = [documents[i] for i in order]
        count = max(1, round(len(shuffled) * held_out)) if len(shuffled) > 1 else 0
        train[stream], held[stream] = shuffled[count:], shuffled[:count]
    if not any(held.values()):
        raise DataError(f"the train parts of {', '.join(tasks)} hold no language with two texts to learn from")
    return Corpus(train, held, dropped_test, dropped_repeated)


def _streams(sources: Mapping[str, Source]) -> Iterator[tuple[str, list[Example]]]:
    for name, source in sorted(sources.items()):
        by_language: dict[str, list[Example]] = {}
        for _, language, part in source.parts():
            by_language.setdefault(language, []).extend(part.train)
        yield from ((f"{name}/{language}", examples) for language, examples in sorted(by_language.items()))


def _documents(examples: Sequence[Example], forbidden: set[str]) -> tuple[list[Document], int, int]:
    """Unique documents, sorted: the first text with its pairs; then counts of test texts and of repetitions."""
    groups: dict[str, list[str]] = {}
    for example in sorted(examples, key=lambda e: (e.text, e.pair or "")):
        groups.setdefault(example.text, []).extend([] if example.pair is None else [example.pair])
    known: set[str] = set()
    documents, tests, repeats = [], 0, 0
    for first, others in groups.items():
        kept = []
        for text in (first, *others):
            normal = normalise(text)
            tests += normal in forbidden
            repeats += normal in known and normal not in forbidden
            if normal and normal not in forbidden and normal not in known:
                kept.append(text)
            known.add(normal)
        if kept:
            documents.append(tuple(kept))
    return documents, tests, repeats


def vocabulary_texts(documents: Mapping[str, Sequence[Document]], smoothing: float) -> Iterator[str]:
    """All texts, those of small streams repeated so that counts follow characters ** smoothing about."""
    sizes = {stream: sum(len(text) for d in docs for text in d) for stream, docs in documents.items()}
    largest = max(sizes.values())
    for stream, docs in documents.items():
        for _ in range(max(1, round((largest / max(sizes[stream], 1)) ** (1 - smoothing)))):
            yield from (text for document in docs for text in document)


@dataclass(frozen=True)
class Blocks:
    """Packed rows by stream, int32 (rows, block); every row is [CLS] and the next block - 1 tokens of its stream."""

    train: Mapping[str, Rows]
    held_out: Mapping[str, Rows]

    def save(self, path: Path) -> None:
        """Writes all rows to one safetensors file."""
        both = {"train": self.train, "held_out": self.held_out}
        save_file({f"{part}:{stream}": rows[stream] for part, rows in both.items() for stream in sorted(rows)}, path)

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
        held_out = sum(int((rows != pad).sum()) for rows in self.held_out.values())
        streams = {stream: int((self.train[stream] != pad).sum()) for stream in sorted(self.train)}
        return {"train_tokens": sum(streams.values()), "held_out_tokens": held_out, "streams": streams}


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
    flat = np.pad(flat, (0, max(0, room - len(flat))), constant_values=tokenizer.pad_token_id)
    rows = flat[: len(flat) // room * room].reshape(-1, room)
    first = np.full((len(rows), 1), tokenizer.cls_token_id, dtype=np.int32)
    return np.ascontiguousarray(np.concatenate([first, rows], axis=1))


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
        streams, draws = list(self.drawn), numpy_rng(self.seed, "pretrain", "streams", step)
        drawn = draws.choice(len(streams), size=self.batch, p=self.probabilities())
        return np.stack([self._take(streams[i]) for i in drawn]).astype(np.int64)

    def _take(self, stream: str) -> Rows:
        rows = self.rows[stream]
        epoch, at = divmod(self.drawn[stream], len(rows))
        if self._orders.get(stream, (-1,))[0] != epoch:
            draws = numpy_rng(self.seed, "pretrain", "rows", stream, epoch)
            self._orders[stream] = epoch, draws.permutation(len(rows))
        self.drawn[stream] += 1
        return np.asarray(rows[self._orders[stream][1][at]], dtype=np.int32)


def token_vectors(rows: Mapping[str, Rows], vocabulary: int, special: Sequence[int], size: int, seed: int) -> Floats:
    """Vectors of all tokens, float32 (vocabulary, size), standard deviation 1 over all that occur; else zeros.

    Args:
        rows: train rows by stream.
        vocabulary: number of tokens.
        special: ids that are neither counted nor given a vector.
        size: columns; those beyond the vocabulary's rank are zero.
        seed: of the SVD's random projection.
    """
    information = _positive_information(_counts(rows, vocabulary, special))
    vectors = np.zeros((vocabulary, size), dtype=np.float32)
    if not information.nnz:
        return vectors
    rank = min(size, vocabulary)
    u, s, _ = randomized_svd(information, rank, n_iter=3, random_state=seed_for(seed, "pretrain", "svd") % 2**32)
    present = np.diff(information.indptr) > 0
    vectors[present, :rank] = (u * np.sqrt(s))[present]  # the others' rows hold rounding noise
    return np.asarray(vectors / vectors[present].std(), dtype=np.float32)


def log_frequencies(rows: Sequence[Rows], vocabulary: int, special: Sequence[int]) -> Floats:
    """Log of each token's share of the rows, special tokens apart, float32 (vocabulary,); half a count is added.

    The output bias starts at them, so that the first steps are not spent on learning these.
    """
    counts = sum((np.bincount(part.ravel(), minlength=vocabulary) for part in rows), np.zeros(vocabulary)) + 0.5
    counts[list(special)] = 0.5
    return np.asarray(np.log(counts / counts.sum()), dtype=np.float32)


def _counts(rows: Mapping[str, Rows], vocabulary: int, special: Sequence[int]) -> csr_array:
    """How often two tokens stand at most `WINDOW` apart, weighted by 1 / distance; symmetric."""
    shape = (vocabulary, vocabulary)
    total = csr_array(shape, dtype=np.float32)
    for stream in sorted(rows):
        for distance in range(1, WINDOW + 1):
            left, right = rows[stream][:, :-distance].ravel(), rows[stream][:, distance:].ravel()
            kept = ~(np.isin(left, special) | np.isin(right, special))
            weights = np.full(int(kept.sum()), 1 / distance, dtype=np.float32)
            total = total + coo_array((weights, (left[kept], right[kept])), shape=shape).tocsr()
    return total + total.T


def _positive_information(counts: csr_array) -> csr_array:
    """max(0, log p(i, j) / (p(i) p(j)^0.75)), the latter normalised."""
    cells = counts.tocoo()
    token = np.bincount(cells.row, cells.data.astype(np.float64), counts.shape[0])
    context = token**SMOOTHING
    context /= max(context.sum(), 1.0)
    information = np.log(cells.data / (token[cells.row] * context[cells.col]))
    kept = information > 0
    values = information[kept].astype(np.float32)
    return csr_array((values, (cells.row[kept], cells.col[kept])), shape=counts.shape)
