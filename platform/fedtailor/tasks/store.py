"""The partitioned task on disk: a table of texts, a table of which client has which rows, a manifest.

Tables are Arrow stream files, written in blocks of equal length and read through a memory map. They are what `datasets`
itself writes, so `datasets.Dataset.from_file(path)` opens them too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fedtailor.core.errors import DataError
from fedtailor.core.messages import Client
from fedtailor.tasks.source import Split, TaskKind

BLOCK = 4096
"""Rows of a record batch (the last one may be shorter); row i lies in batch i // BLOCK at i % BLOCK."""


Ints = npt.NDArray[np.int64]

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
    try:
        with pa.ipc.open_stream(pa.memory_map(str(path), "r")) as reader:
            batches = list(reader)
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path}: missing or damaged data file: {error}") from error
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


@dataclass(frozen=True)
class ClientIndex:
    """Which rows belong to which client: two offsets per client into examples.arrow."""

    clients: tuple[Client, ...]
    index: Mapping[str, int]
    starts: Ints
    rows: tuple[Ints, ...]

    @classmethod
    def open(cls, path: Path, clients: tuple[Client, ...]) -> ClientIndex:
        """Maps ``path/examples.arrow``. Clients are in file order."""
        starts = np.cumsum([0] + [c.n_train + c.n_test for c in clients], dtype=np.int64)
        batches = open_stream(path / "examples.arrow", int(starts[-1]))
        rows = tuple(batch.column("row").to_numpy() for batch in batches)
        return cls(clients, {c.id: i for i, c in enumerate(clients)}, starts, rows)

    def client(self, client_id: str) -> Client:
        """The client of this id.

        Raises:
            DataError: no such client.
        """
        if client_id not in self.index:
            known = f"{self.clients[0].id} .. {self.clients[-1].id}" if self.clients else "none"
            raise DataError(f"no client {client_id!r} in this task; clients: {known}")
        return self.clients[self.index[client_id]]

    def rows_of(self, client_id: str, split: Split) -> Ints:
        """Rows of the text table that a client holds, (n,) int64, in the client's order."""
        client = self.client(client_id)
        start = int(self.starts[self.index[client_id]])
        if split == "test":
            start += client.n_train
        return self._slice(start, client.n_train if split == "train" else client.n_test)

    def _slice(self, start: int, n: int) -> Ints:
        pieces = []
        while n:
            block, at = divmod(start, BLOCK)
            piece = self.rows[block][at : at + n]
            pieces.append(piece)
            start, n = start + len(piece), n - len(piece)
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Partitioned:
    """What the texts and the tokens of partitioned clients have in common: folder, manifest, who holds which rows."""

    path: Path
    manifest: Mapping[str, Any] = field(repr=False)
    members: ClientIndex = field(repr=False)

    @property
    def kind(self) -> TaskKind:
        """What the task asks for: a class, or a response."""
        return kind_of(self.manifest)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names; of a generation task the groups that results are reported by."""
        return tuple(self.manifest["labels"])

    @property
    def clients(self) -> tuple[Client, ...]:
        """All clients by (pool, language, index)."""
        return self.members.clients

    @property
    def hash(self) -> str:
        """sha256 of all clients' content; of tokens also of all token ids."""
        return str(self.manifest["hash"])

    def pool(self, name: str) -> tuple[Client, ...]:
        """The clients of one pool."""
        return tuple(client for client in self.clients if client.pool == name)

    def client(self, client_id: str) -> Client:
        """The client of this id."""
        return self.members.client(client_id)


@dataclass(frozen=True)
class TaskData(Partitioned):
    """A prepared task, opened read-only; texts stay on disk until asked for."""

    batches: tuple[pa.RecordBatch, ...] = field(repr=False)

    @classmethod
    def open(cls, path: Path | str) -> TaskData:
        """Opens a folder that `prepare` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        path = Path(path)
        manifest = read_manifest(path / "manifest.json")
        members = ClientIndex.open(path, clients_of(manifest))
        return cls(path, manifest, members, tuple(open_stream(path / "texts.arrow", manifest["rows"])))

    @property
    def paired(self) -> bool:
        """The examples are pairs of texts; an instruction and its response are one too."""
        return bool(self.batches) and "pair" in self.batches[0].schema.names

    def texts(self, client_id: str, split: Split) -> tuple[list[str], Ints]:
        """A client's texts (of a pair the first one, see `pairs`) or instructions, and their labels, (n,) int64."""
        rows = self.members.rows_of(client_id, split)
        return cells(self.batches, "text", rows), np.array(cells(self.batches, "label", rows), dtype=np.int64)

    def pairs(self, client_id: str, split: Split) -> list[str] | None:
        """The second texts in the order of `texts`; None where texts are single."""
        rows = self.members.rows_of(client_id, split)
        return cells(self.batches, "pair", rows) if self.paired else None

    def responses(self, client_id: str, split: Split) -> list[str]:
        """The responses in the order of `texts`.

        Raises:
            DataError: the task asks for classes.
        """
        return self._of_instructions("pair", client_id, split)

    def history(self, client_id: str, split: Split) -> list[str | None]:
        """The turns before each instruction in the order of `texts`: JSON, or None where it is the first.

        Raises:
            DataError: the task asks for classes.
        """
        return self._of_instructions("history", client_id, split)

    def _of_instructions(self, column: str, client_id: str, split: Split) -> list[Any]:
        if self.kind != "generation":
            raise DataError(f"{self.path}: a {self.kind} task has labels and no responses")
        return cells(self.batches, column, self.members.rows_of(client_id, split))

    def train_texts(self, pool: str = "seen") -> Iterator[str]:
        """The pool's train texts (both of a pair, an instruction and its response), each row once, in table order."""
        names = ["pool", "split", "text", *(["pair"] if self.paired else [])]
        for batch in self.batches:
            columns = (batch.column(name).to_pylist() for name in names)
            for its_pool, split, *texts in zip(*columns, strict=True):
                if its_pool == pool and split == "train":
                    yield from texts


def cells(batches: Sequence[pa.RecordBatch], column: str, rows: Ints) -> list[Any]:
    """A column's values at ``rows`` of a table that is stored in blocks of `BLOCK` rows."""
    return [batches[row // BLOCK].column(column)[int(row % BLOCK)].as_py() for row in rows]


def clients_of(manifest: Mapping[str, Any]) -> tuple[Client, ...]:
    """The manifest's clients, in its order."""
    clients = []
    for entry in manifest["clients"]:
        pool, language, _ = entry["id"].split("/")
        clients.append(Client(entry["id"], pool, language, entry["n_train"], entry["n_test"]))
    return tuple(clients)


def kind_of(manifest: Mapping[str, Any]) -> TaskKind:
    """The kind of a task or of its tokens; manifests that do not name one are of classification."""
    return "generation" if manifest.get("kind") == "generation" else "classification"


def read_manifest(path: Path) -> dict[str, Any]:
    """Parses a manifest.

    Raises:
        DataError: missing, not JSON, or not an object with clients.
    """
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: missing or damaged manifest: {error}") from error
    if not isinstance(manifest, dict) or "clients" not in manifest:
        raise DataError(f"{path}: not a manifest, it has no 'clients'")
    return manifest
