"""One committed round: what its COMMIT.json says, and the objects that it vouches for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from fedtailor.core.errors import StorageError
from fedtailor.storage.files import MissingFileError, Storage, safe_path
from fedtailor.storage.payloads import Array, canonical_json, read_table, read_tensors, sha256

SCHEMA = 1
RECORD, PRUNED = "COMMIT.json", "PRUNED.json"
Bytes = bytes  # `Commit.bytes` hides the name in its class


class DamagedError(StorageError):
    """A commit, or a file that it names, is not what was written; says which file."""


@dataclass(frozen=True)
class ObjectRef:
    """A file of a commit.

    Args:
        path: path of the file, relative to the log.
        sha256: hex hash of the file.
        size: bytes.
        content: hash of the values in it (`payloads.inspect`); the same for every attempt.
    """

    path: str
    sha256: str
    size: int
    content: str


@dataclass(frozen=True)
class Commit:
    """A committed round; made by `CommitLog`.

    Args:
        index: round or chunk, from 0.
        record: what the stage recorded (cohort, weights, ...), JSON.
        objects: name to file.
        previous: sha256 of the previous round's COMMIT.json, None for round 0.
        sha256: of this round's COMMIT.json.
        pruned: names whose files may have been deleted since.
    """

    storage: Storage
    path: str
    index: int
    record: Mapping[str, Any]
    objects: Mapping[str, ObjectRef]
    previous: str | None
    sha256: str
    pruned: frozenset[str] = frozenset()

    @property
    def complete(self) -> bool:
        """Whether all objects are still kept, so that a run can go on from here."""
        return not self.pruned

    def bytes(self, name: str) -> Bytes:
        """Content of an object, checked against its hash.

        Raises:
            DamagedError: the file is missing or differs from what was committed.
            StorageError: no such object, or pruned.
        """
        where = f"{self.storage.full(self.path)}, round {self.index}"
        if name not in self.objects:
            raise StorageError(f"{where} has no object '{name}' (it has: {', '.join(self.objects)})")
        if name in self.pruned:
            raise StorageError(f"{where}: '{name}' was pruned; only the newest rounds keep their state")
        ref = self.objects[name]
        path = f"{self.path}/{ref.path}"
        try:
            data = self.storage.read_bytes(path)
        except MissingFileError as error:
            raise DamagedError(f"{self.storage.full(path)} is missing") from error
        if len(data) != ref.size or sha256(data) != ref.sha256:
            raise DamagedError(f"{self.storage.full(path)} is not what was committed (sha256 differs)")
        return data

    def tensors(self, name: str) -> dict[str, Array]:
        """Arrays of a safetensors object, read-only; see `bytes` for errors."""
        return read_tensors(name, self.bytes(name))

    def table(self, name: str) -> pa.Table:
        """Table of a Parquet object; see `bytes` for errors."""
        return read_table(name, self.bytes(name))

    def verify(self) -> None:
        """Reads every object that is not pruned.

        Raises:
            DamagedError: the first file that is missing or differs.
        """
        for name in self.objects:
            if name not in self.pruned:
                self.bytes(name)


def folder(index: int) -> str:
    """Folder of a round inside its log.

    >>> folder(42)
    'rounds/000042'
    """
    return f"rounds/{index:06d}"


def seal(content: Mapping[str, Any]) -> bytes:
    """Canonical JSON that carries its own hash under ``self``, so that any edit shows."""
    return canonical_json({**content, "self": sha256(canonical_json(content))})


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """Reverses `seal`.

    Raises:
        DamagedError: a single byte differs from what `seal` wrote.
    """
    try:
        content = json.loads(data)
        del content["self"]
        if seal(content) == data:
            return dict(content)
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, StorageError):
        pass  # whatever else it may be, it is not what was sealed
    raise DamagedError(f"{where} was changed after it was written (its own hash does not fit)")


def compose(index: int, previous: str | None, record: Mapping[str, Any], objects: Mapping[str, ObjectRef]) -> Bytes:
    """Content of a COMMIT.json."""
    refs = {name: vars(ref) for name, ref in objects.items()}
    return seal({"schema": SCHEMA, "index": index, "previous": previous, "record": dict(record), "objects": refs})


def load(storage: Storage, path: str, index: int) -> Commit:
    """Reads a round's COMMIT.json (and PRUNED.json); the objects are not read.

    Raises:
        DamagedError: missing, edited, of another round or schema, or naming files outside the log.
    """
    where, note = (f"{path}/{folder(index)}/{name}" for name in (RECORD, PRUNED))
    name = storage.full(where)
    try:
        data = storage.read_bytes(where)
    except MissingFileError as error:
        raise DamagedError(f"{name} is missing") from error
    content, heavy = unseal(data, name), ()
    if storage.exists(note):
        mark = unseal(storage.read_bytes(note), storage.full(note))
        if mark["commit"] != sha256(data):
            raise DamagedError(f"{storage.full(note)} belongs to another commit")
        heavy = tuple(mark["heavy"])
    try:
        if (content["schema"], content["index"]) != (SCHEMA, index):
            raise DamagedError(f"schema {content['schema']}, round {content['index']}; expected {SCHEMA} and {index}")
        refs = {safe_path(key): ObjectRef(**ref) for key, ref in sorted(content["objects"].items())}
        for ref in refs.values():
            if not safe_path(ref.path).startswith("rounds/"):
                raise DamagedError(f"{ref.path!r} lies outside of the rounds")
        pruned = frozenset(key for key in refs if heavy and key.startswith(heavy))
        record, objects = MappingProxyType(content["record"]), MappingProxyType(refs)
        return Commit(storage, path, index, record, objects, content["previous"], sha256(data), pruned)
    except (KeyError, TypeError, AttributeError, StorageError) as error:
        raise DamagedError(f"{name} is not a commit of round {index}: {error}") from error
