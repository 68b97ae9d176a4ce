"""One committed round: what its COMMIT.json says, the objects that it vouches for, pruning and quarantine.

A round that does not verify is moved to ``quarantine/`` with the reason, never loaded and never deleted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from fedtailor.core.errors import StorageError
from fedtailor.core.faults import point
from fedtailor.storage.files import MissingFileError, Storage, join, safe_path
from fedtailor.storage.payloads import Array, canonical_json, read_table, read_tensors, sha256

SCHEMA = 1

RECORD, PRUNED = "COMMIT.json", "PRUNED.json"

QUARANTINE, REASON = "quarantine", "REASON.json"

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
        ref = self.objects.get(name)
        if ref is None:
            raise StorageError(f"{self._where} has no object '{name}' (it has: {', '.join(self.objects)})")
        if name in self.pruned:
            raise StorageError(f"{self._where}: '{name}' was pruned; only the newest rounds keep their state")
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

    @property
    def _where(self) -> str:
        return f"{self.storage.full(self.path)}, round {self.index}"


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
        mark = content.pop("self")
        intact = sha256(canonical_json(content)) == mark and seal(content) == data
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, StorageError):
        intact = False
    if not intact:
        raise DamagedError(f"{where} was changed after it was written (its own hash does not fit)")
    return dict(content)


def compose(index: int, previous: str | None, record: Mapping[str, Any], objects: Mapping[str, ObjectRef]) -> Bytes:
    """Content of a COMMIT.json."""
    refs = {name: vars(ref) for name, ref in objects.items()}
    return seal({"schema": SCHEMA, "index": index, "previous": previous, "record": dict(record), "objects": refs})


def load(storage: Storage, path: str, index: int) -> Commit:
    """Reads a round's COMMIT.json (and PRUNED.json); the objects are not read.

    Raises:
        DamagedError: missing, edited, of another round or schema, or naming files outside the log.
    """
    where = f"{path}/{folder(index)}"
    try:
        data = storage.read_bytes(f"{where}/{RECORD}")
    except MissingFileError as error:
        raise DamagedError(f"{storage.full(where)}/{RECORD} is missing") from error
    name = f"{storage.full(where)}/{RECORD}"
    content = unseal(data, name)
    try:
        commit = _parse(storage, path, index, content, sha256(data))
    except (KeyError, TypeError, AttributeError, StorageError) as error:
        raise DamagedError(f"{name} is not a commit of round {index}: {error}") from error
    heavy = _pruned_prefixes(storage, where, commit.sha256)
    return replace(commit, pruned=frozenset(key for key in commit.objects if heavy and key.startswith(heavy)))


def _parse(storage: Storage, path: str, index: int, content: Mapping[str, Any], digest: str) -> Commit:
    if content["schema"] != SCHEMA or content["index"] != index:
        raise DamagedError(f"schema {content['schema']}, round {content['index']}; expected {SCHEMA} and {index}")
    refs = {safe_path(key): ObjectRef(**ref) for key, ref in sorted(content["objects"].items())}
    for ref in refs.values():
        if not safe_path(ref.path).startswith("rounds/"):
            raise DamagedError(f"{ref.path!r} lies outside of the rounds")
    record, objects = MappingProxyType(content["record"]), MappingProxyType(refs)
    return Commit(storage, path, index, record, objects, content["previous"], digest)


def _mark_pruned(commit: Commit, heavy: tuple[str, ...]) -> None:
    """Records, before anything is deleted, that objects with these prefixes are no longer needed."""
    mark = {"schema": SCHEMA, "commit": commit.sha256, "heavy": sorted(heavy)}
    commit.storage.write_bytes(f"{commit.path}/{folder(commit.index)}/{PRUNED}", seal(mark))


def prune_round(commit: Commit, heavy: tuple[str, ...]) -> None:
    """Deletes a commit's objects whose name starts with one of ``heavy``; a sidecar says first what may be gone."""
    names = [name for name in commit.objects if name.startswith(heavy)]
    if not names:
        return
    point("prune:before")
    if not commit.pruned.issuperset(names):
        _mark_pruned(commit, heavy)
    point("prune:recorded")
    for name in names:
        commit.storage.delete(join(commit.path, commit.objects[name].path))
    point("prune:after")


def _pruned_prefixes(storage: Storage, where: str, commit: str) -> tuple[str, ...]:
    path = f"{where}/{PRUNED}"
    if not storage.exists(path):
        return ()
    mark = unseal(storage.read_bytes(path), storage.full(path))
    if mark["commit"] != commit:
        raise DamagedError(f"{storage.full(path)} belongs to another commit")
    return tuple(mark["heavy"])


def quarantine(storage: Storage, path: str, index: int, reason: str) -> str:
    """Moves a round of the log at ``path`` to ``quarantine/`` and returns where it is now."""
    taken = set(storage.list(join(path, QUARANTINE)))
    name = f"{index:06d}"
    number = 0
    while name in taken:
        number += 1
        name = f"{index:06d}-{number}"
    source, target = join(path, folder(index)), join(path, QUARANTINE, name)
    # Written before the move: a crash in between must not leave an entry without a reason.
    storage.write_json(join(source, REASON), {"round": index, "reason": reason})
    storage.move(source, target)
    return target


def sweep(storage: Storage, path: str) -> None:
    """Deletes temporary files that a killed writer left in a folder."""
    for name in storage.list(path):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.delete(join(path, name))
