"""The partitioned task on disk: a table of texts, a table of which client has which rows, a manifest.

Tables are Arrow stream files, written in blocks of equal length and read through a memory map. They are what `datasets`
itself writes, so `datasets.Dataset.from_file(path)` opens them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedtailor.core.errors import DataError, reported_as
from fedtailor.core.messages import Client
from fedtailor.tasks.source import ClassScore, Example, Split, TaskKind

BLOCK = 4096
"""Rows of a record batch (the last one may be shorter); row i lies in batch i // BLOCK at i % BLOCK."""


Ints = npt.NDArray[np.int64]

POOLED = "pooled/all/all"
"""Id of a client that has the rows of all seen clients, which is asked for by it alone and is in no list."""

TEXTS = pa.schema(
    {
        "pool": pa.string(),
        "language": pa.string(),
        "split": pa.string(),
        "text": pa.large_string(),
        "label": pa.int32(),
    }
)
"""texts.arrow: every text of the source once; its row number is its name."""

PAIRS = TEXTS.append(pa.field("pair", pa.large_string()))
"""texts.arrow of a sentence-pair task."""

INSTRUCTIONS = PAIRS.append(pa.field("history", pa.large_string()))
"""texts.arrow of a generation task: `text` is the instruction, `pair` its response, `label` the example's group and
`language` that group's name, `history` the turns before it as JSON, or null."""

REFERENCES = INSTRUCTIONS.append(pa.field("others", pa.list_(pa.large_string())))
"""texts.arrow of a generation task with several references: `others`, those beside `pair`."""

ANSWERS = pa.schema({"question": pa.large_string(), "answer": pa.large_string()})
"""answers.arrow of instructions: row i is row i of texts.arrow, as it was before any cut; with `REFERENCES`' others."""

QUESTIONS = PAIRS.append(pa.field("answers", pa.large_string()))
"""texts.arrow of an extraction task: `text` is the question, `pair` its context, `label` its topic, `answers` its spans
as JSON, empty where the context has no answer."""

EXAMPLES = pa.schema({"client": pa.int32(), "test": pa.bool_(), "row": pa.int32()})
"""examples.arrow: client (index into the manifest's clients), split, row of texts.arrow; train first."""


def write_stream(path: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> None:
    """Writes record batches one after another; holds one batch in memory."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def open_stream(path: Path, rows: int) -> list[pa.RecordBatch]:
    """Memory-maps a file written by `write_stream`; no column is read before it is used.

    Raises:
        DataError: the file is missing, damaged, or does not hold `rows` rows; names it.
    """
    with reported_as(DataError, f"{path}: missing or damaged data file", OSError, pa.ArrowInvalid):
        batches = list(pa.ipc.open_stream(pa.memory_map(str(path), "r")))
    # A stream that was cut between two batches reads as a shorter one.
    found = sum(batch.num_rows for batch in batches)
    if found != rows:
        raise DataError(f"{path}: damaged data file: {found} rows, its manifest says {rows}")
    return batches


def write_examples(path: Path, rows: Sequence[Sequence[npt.NDArray[Any]]]) -> None:
    """Writes ``examples.arrow``: each client's train and test rows of the text table, (n,) integers."""
    every = np.concatenate([part for parts in rows for part in parts]).astype(np.int32)
    sizes = np.array([[len(part) for part in parts] for parts in rows])
    clients = np.repeat(np.arange(len(rows), dtype=np.int32), sizes.sum(axis=1))
    test = np.repeat(np.tile([False, True], len(rows)), sizes.ravel())
    blocks = (slice(at, at + BLOCK) for at in range(0, len(every), BLOCK))
    write_stream(path, EXAMPLES, (pa.record_batch([clients[b], test[b], every[b]], schema=EXAMPLES) for b in blocks))


def write_answers(path: Path, data: TaskData) -> None:
    """Writes ``answers.arrow``: instructions and right responses as they were before they became tokens."""
    schema = ANSWERS.append(REFERENCES.field("others")) if data.several else ANSWERS
    columns = ("text", "pair", "others")[: len(schema)]
    blocks = ([batch.column(name) for name in columns] for batch in data.batches)
    write_stream(path, schema, (pa.record_batch(block, schema=schema) for block in blocks))


class Partitioned:
    """What the texts and the tokens of partitioned clients have in common: folder, manifest, who holds which rows.

    Args:
        path: the folder; its tables are mapped read-only.
        pool_apart: clients are without the rows of the validation pool, as methods see them that tune on it.

    Raises:
        DataError: a file is missing or damaged.
    """

    def __init__(self, path: Path | str, pool_apart: bool = False) -> None:
        self.path = Path(path)
        self.manifest: Mapping[str, Any] = read_manifest(self.path / "manifest.json")
        self.clients = clients_of(self.manifest)
        """All clients by (pool, language, index)."""
        self._index = {client.id: i for i, client in enumerate(self.clients)}
        self._starts = np.cumsum([0] + [c.n_train + c.n_test for c in self.clients], dtype=np.int64)
        batches = open_stream(self.path / "examples.arrow", int(self._starts[-1]))
        self._rows = pa.chunked_array([batch.column("row") for batch in batches], pa.int32())
        self._apart = self.pool_rows if pool_apart else np.empty(0, np.int64)
        if len(self._apart):
            self.clients = tuple(replace(c, n_train=len(self.rows_of(c.id, "train"))) for c in self.clients)

    @classmethod
    def open(cls, path: Path | str, pool_apart: bool = False) -> Self:
        """Opens a folder that `prepare` or `tokenise` wrote."""
        return cls(path, pool_apart)

    @property
    def kind(self) -> TaskKind:
        """What the task asks for: a class, a response, numbers, a span. Manifests without it are of classification."""
        kind: TaskKind = self.manifest.get("kind", "classification")
        return kind

    @property
    def several(self) -> bool:
        """Some instructions have more than one right response; answers are then scored as a corpus, too."""
        return bool(self.manifest.get("several", False))

    @property
    def label_answers(self) -> Mapping[str, Sequence[str]]:
        """Groups of instructions whose responses are labels, with these."""
        found: Mapping[str, Sequence[str]] = self.manifest.get("label_answers", {})
        return found

    @property
    def score(self) -> ClassScore:
        """What a classification task is compared by; see `Source.score`."""
        return "mcc" if self.manifest.get("score") == "mcc" else "accuracy"

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; of a generation task the groups that results are reported by."""
        return tuple(self.manifest["labels"])

    @property
    def hash(self) -> str:
        """sha256 of all clients' content; of tokens also of all token ids."""
        return str(self.manifest["hash"])

    @property
    def pool_rows(self) -> Ints:
        """Rows of the table that make up the validation pool, by class and then by row; mostly none."""
        by_class = self.manifest.get("validation", {})
        return np.array([row for label in self.labels for row in by_class.get(label, ())], dtype=np.int64)

    def pool(self, name: str) -> tuple[Client, ...]:
        """The clients of one pool."""
        return tuple(client for client in self.clients if client.pool == name)

    def client(self, client_id: str) -> Client:
        """The client of this id.

        Raises:
            DataError: no such client.
        """
        if client_id == POOLED:
            sizes = (sum(c.n_train for c in self.pool("seen")), sum(c.n_test for c in self.pool("seen")))
            return Client(POOLED, "seen", "all", *sizes)
        return self.clients[self._number(client_id)]

    def rows_of(self, client_id: str, split: Split) -> Ints:
        """Rows of the table that a client holds, (n,) int64, in the client's order."""
        if client_id == POOLED:
            return np.concatenate([self.rows_of(client.id, split) for client in self.pool("seen")])
        number = self._number(client_id)
        start, end = (int(at) for at in self._starts[number : number + 2])
        rows: Ints = self._rows.slice(start, end - start).to_numpy().astype(np.int64)
        tests = self.clients[number].n_test
        mine = rows[: len(rows) - tests] if split == "train" else rows[len(rows) - tests :]
        return mine[~np.isin(mine, self._apart)] if len(self._apart) else mine

    def entry(self, client_id: str) -> Mapping[str, Any]:
        """What the manifest says of a client."""
        found: Mapping[str, Any] = self.manifest["clients"][self._number(client_id)]
        return found

    def _number(self, client_id: str) -> int:
        if client_id not in self._index:
            known = f"{self.clients[0].id} .. {self.clients[-1].id}" if self.clients else "none"
            raise DataError(f"no client {client_id!r} in this task; clients: {known}")
        return self._index[client_id]


class TaskData(Partitioned):
    """A prepared task, opened read-only; texts stay on disk until asked for."""

    def __init__(self, path: Path | str, pool_apart: bool = False) -> None:
        super().__init__(path, pool_apart)
        self.batches = open_stream(self.path / "texts.arrow", self.manifest["rows"])

    @property
    def paired(self) -> bool:
        """The examples are pairs of texts; an instruction and its response are one too."""
        return bool(self.batches) and "pair" in self.batches[0].schema.names

    def texts(self, client_id: str, split: Split) -> tuple[list[str], Ints]:
        """A client's texts (of a pair the first one, see `pairs`) or instructions, and their labels, (n,) int64."""
        rows = self.rows_of(client_id, split)
        return cells(self.batches, "text", rows), np.array(cells(self.batches, "label", rows), dtype=np.int64)

    def pairs(self, client_id: str, split: Split) -> list[str] | None:
        """The second texts, or the responses, in the order of `texts`; None where texts are single."""
        return cells(self.batches, "pair", self.rows_of(client_id, split)) if self.paired else None

    def train_texts(self, pool: str = "seen") -> Iterator[str]:
        """The pool's train texts (both of a pair, an instruction and its response), each row once, in table order."""
        names = ["pool", "split", "text", *(["pair"] if self.paired else [])]
        for batch in self.batches:
            columns = (batch.column(name).to_pylist() for name in names)
            for its_pool, split, *texts in zip(*columns, strict=True):
                if its_pool == pool and split == "train":
                    yield from texts

    def every_text(self) -> Iterator[str]:
        """All texts, train and test, in table order; of a pair the first."""
        for batch in self.batches:
            yield from batch.column("text").to_pylist()


def cells(batches: Sequence[pa.RecordBatch], column: str, rows: Ints) -> list[Any]:
    """A column's values at ``rows`` of a table that is stored in blocks of `BLOCK` rows."""
    return [batches[row // BLOCK].column(column)[int(row % BLOCK)].as_py() for row in rows]


def examples_of(batch: pa.RecordBatch) -> Iterator[Example]:
    """The examples of a block of texts.arrow, in order."""
    names = [name for name in Example._fields if name in batch.schema.names]
    for values in zip(*(batch.column(name).to_pylist() for name in names), strict=True):
        yield Example(**dict(zip(names, values, strict=True)))


def clients_of(manifest: Mapping[str, Any]) -> tuple[Client, ...]:
    """The manifest's clients, in its order."""
    clients = []
    for entry in manifest["clients"]:
        pool, language, _ = entry["id"].split("/")
        clients.append(Client(entry["id"], pool, language, entry["n_train"], entry["n_test"]))
    return tuple(clients)


def read_manifest(path: Path) -> dict[str, Any]:
    """Parses a manifest.

    Raises:
        DataError: missing, not JSON, or not an object with clients.
    """
    with reported_as(DataError, f"{path}: missing or damaged manifest", OSError, ValueError):
        manifest = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(manifest, dict) or "clients" not in manifest:
        raise DataError(f"{path}: not a manifest, it has no 'clients'")
    return manifest
