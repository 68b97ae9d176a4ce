"""The texts that a base may learn from: every train text of the named tasks, no test text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Example, Source, normalise
from fedtailor.tasks.task import TASKS, task_config

Document = tuple[str, ...]
"""Texts that belong together: an article, or a premise and its hypotheses."""

_ALL = 2**31 - 1


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
        for part in (self.train, self.held_out):
            for stream, documents in part.items():
                for document in documents:
                    total.update("\0".join((stream, *document)).encode() + b"\1")
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
    sources = {name: TASKS[name].load(_everything(name), seed) for name in tasks}
    forbidden = {normalise(text) for source in sources.values() for e in _of(source, "test") for text in _texts(e)}
    train: dict[str, Sequence[Document]] = {}
    held: dict[str, Sequence[Document]] = {}
    dropped_test = dropped_repeated = 0
    for stream, examples in _streams(sources):
        documents, tests, repeats = _documents(examples, forbidden)
        dropped_test, dropped_repeated = dropped_test + tests, dropped_repeated + repeats
        order = numpy_rng(seed, "pretrain", "documents", stream).permutation(len(documents))
        shuffled = [documents[i] for i in order]
        count = max(1, round(len(shuffled) * held_out)) if len(shuffled) > 1 else 0
        train[stream], held[stream] = shuffled[count:], shuffled[:count]
    corpus = Corpus(train, held, dropped_test, dropped_repeated)
    if not any(held.values()):
        raise DataError(f"the train parts of {', '.join(tasks)} hold no language with two texts to learn from")
    return corpus


def vocabulary_texts(documents: Mapping[str, Sequence[Document]], smoothing: float) -> Iterator[str]:
    """All texts, those of small streams repeated so that counts follow characters ** smoothing about."""
    sizes = {stream: sum(len(text) for d in docs for text in d) for stream, docs in documents.items()}
    largest = max(sizes.values())
    for stream, docs in documents.items():
        for _ in range(max(1, round((largest / max(sizes[stream], 1)) ** (1 - smoothing)))):
            yield from (text for document in docs for text in document)


def _everything(name: str) -> TaskConfig:
    # Pools without bounds: both together are the whole train part.
    return task_config(name, train_per_pool=_ALL, test_per_pool=_ALL)


def _of(source: Source, split: str) -> Iterator[Example]:
    for _, _, part in source.parts():
        yield from part.train if split == "train" else part.test


def _texts(example: Example) -> Document:
    return (example.text,) if example.pair is None else (example.text, example.pair)


def _streams(sources: Mapping[str, Source]) -> Iterator[tuple[str, list[Example]]]:
    for name, source in sorted(sources.items()):
        found: dict[str, list[Example]] = {}
        for _, language, part in source.parts():
            found.setdefault(language, []).extend(part.train)
        for language, examples in sorted(found.items()):
            yield f"{name}/{language}", examples


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
