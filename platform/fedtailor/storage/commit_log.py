"""A stage's artifact folder as a log of numbered commits: a round exists if and only if its COMMIT verifies.

Objects go under names unique to the attempt, are re-opened and checked, and COMMIT.json, written last,
names them with their hashes and the hash of the commit before. A round that does not verify is moved to
``quarantine/`` with the reason, never loaded and never deleted. See DESIGN.md section 8.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fedtailor.core.errors import StorageError
from fedtailor.core.faults import point
from fedtailor.storage.commit import (
    PRUNED,
    RECORD,
    SCHEMA,
    Commit,
    DamagedError,
    ObjectRef,
    compose,
    folder,
    load,
    seal,
)
from fedtailor.storage.files import MissingFileError, Storage, join, storage_errors
from fedtailor.storage.payloads import Payload, encode, extent, inspect, sha256

LATEST, QUARANTINE, REASON = "LATEST", "quarantine", "REASON.json"


class CommitLog:
    """Commits of one stage. Only the holder of the artifact's lock writes or repairs.

    Args:
        storage: storage of the log.
        path: the artifact's folder, e.g. ``artifacts/base-0123``.
        on_event: receives what was repaired, each also kept in ``events``: ``{"event": "quarantined" |
            "leftover-removed" | "lost", "log": path, "round": n, "reason": text}``.
        guard: called before a commit becomes visible; raises if the lock was lost.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        guard: Callable[[], None] | None = None,
    ) -> None:
        self.storage, self.path = storage, path
        self.events: list[dict[str, Any]] = []
        self._on_event, self._guard = on_event, guard
        self._pruned_below = 0

    def commit(self, index: int, objects: Mapping[str, Payload], record: Mapping[str, Any]) -> Commit:
        """Adds a round: wholly, or not at all.

        Args:
            index: one more than the newest round; the first is 0.
            objects: name to payload; ``.safetensors`` and ``.parquet`` are appended where missing.
            record: JSON; deterministic, as all of it enters the digest.

        Raises:
            StorageError: the round exists, the one before does not, a value is not finite, the disk is full
                or read-only, or the files read back differ. Nothing of the round is left.
        """
        previous = self._make_room(index)
        attempt = join(self._at(index), secrets.token_hex(6))
        try:
            with storage_errors(f"committing {self._full(index)}"):
                point("commit:start")
                refs = self._write(attempt, objects)
                point("commit:objects-verified")
                data = compose(index, previous, record, refs)
                point("commit:before-record")
                if self._guard:
                    self._guard()
                path = join(self._at(index), RECORD)
                if not self.storage.create(path, data, lambda: point("commit:record-temp")):
                    raise StorageError(f"{self.storage.full(path)} was committed by another process meanwhile")
                point("commit:after-record")
                self._write_hint(index)
                point("commit:latest")
        except BaseException as error:
            self._discard(index, attempt, error)
            raise
        return self.read(index)

    def read(self, index: int) -> Commit:
        """A round's commit; its objects are checked when they are read.

        Raises:
            DamagedError: missing or edited.
        """
        return load(self.storage, self.path, index)

    def newest(self, repair: bool = True) -> Commit | None:
        """The newest round from which a run can go on: all of its files verify, none is pruned.

        Args:
            repair: move newer rounds that do not verify to ``quarantine/`` and remove leftovers of attempts
                that never committed. False changes nothing (for readers without the lock).

        Raises:
            DamagedError: the newest round is whole but the chain of COMMIT.json below it is not.
        """
        unfit: dict[int, str] = {}
        newest, rounds = None, list(self._scan(objects=False))
        for index, commit, flaw in reversed(rounds):
            try:
                if commit is None or not commit.complete:
                    raise DamagedError(flaw or f"{self._full(index)}: its state was pruned")
                commit.verify()
                newest = commit
                break
            except DamagedError as error:
                unfit[index] = str(error)
        if newest and (broken := [flaw for index, _, flaw in rounds if flaw and index <= newest.index]):
            raise DamagedError(
                f"{broken[0]}; round {newest.index} is whole, but its history is not. Restore that file, "
                f"or move {self.storage.full(self.path)} away to compute the stage again"
            )
        if repair:
            self._repair(newest.index if newest else -1, unfit)
        return newest

    def all(self, repair: bool = False, objects: bool = True) -> list[Commit]:
        """The longest prefix 0..n of rounds that verify, chain included.

        Args:
            repair: move whatever follows the prefix to ``quarantine/``; needs the lock.
            objects: read the objects too; False checks COMMIT.json files alone.
        """
        prefix, unfit = self._prefix(objects)
        if repair:
            self._repair(len(prefix) - 1, unfit)
        return prefix

    def damage(self) -> str | None:
        """Why a round that was once committed no longer verifies, or None; changes nothing."""
        prefix, unfit = self._prefix(objects=True)
        known = max([self._hinted(), *filter(self._visible, self._rounds())], default=-1) + 1
        if len(prefix) == known:
            return None
        state = "was being written" if self._visible(len(prefix)) else "is missing"
        return next(iter(unfit.values()), f"{self._full(len(prefix))}/{RECORD} {state}")

    def prune(self, keep: int, heavy: Sequence[str]) -> None:
        """Deletes objects whose name starts with one of ``heavy`` from all but the newest ``keep`` rounds.

        COMMIT.json, its hashes and all other objects stay; a sidecar written first says what may be gone.

        Raises:
            StorageError: keep < 1, or a file cannot be deleted.
        """
        if keep < 1:
            raise StorageError(f"prune: keep must be at least 1, got {keep}")
        for index in self._rounds()[:-keep]:
            if index < self._pruned_below:
                continue
            with storage_errors(f"pruning {self._full(index)}"):
                commit = self.read(index)
                names = [name for name in commit.objects if name.startswith(tuple(heavy))]
                point("prune:before")
                if not commit.pruned.issuperset(names):
                    mark = {"schema": SCHEMA, "commit": commit.sha256, "heavy": sorted(heavy)}
                    self.storage.write_bytes(join(self._at(index), PRUNED), seal(mark))
                point("prune:recorded")
                for name in names:
                    self.storage.delete(join(self.path, commit.objects[name].path))
                point("prune:after")
            self._pruned_below = index + 1

    def _write(self, attempt: str, objects: Mapping[str, Payload]) -> dict[str, ObjectRef]:
        """Writes, flushes and reads back all objects."""
        written: dict[str, tuple[str, bytes, Payload]] = {}
        for given, payload in objects.items():
            name, data = encode(given, payload)
            if name in written:
                raise StorageError(f"two objects of one commit are named '{name}'")
            written[name] = join(attempt, name), data, payload
            self.storage.write_bytes(written[name][0], data, durable=False)
            point("commit:object-written")
        self.storage.flush(path for path, _, _ in written.values())
        refs = {}
        for name, (path, data, payload) in sorted(written.items()):
            full, stored = self.storage.full(path), self.storage.read_bytes(path)
            if stored != data:
                raise StorageError(f"{full} reads back differently from what was written")
            content, seen = inspect(name, stored)
            meant = extent(name, payload)
            if meant is not None and seen != meant:
                raise StorageError(f"{full} holds {seen} after writing {meant}")
            refs[name] = ObjectRef(path[len(self.path) + 1 :], sha256(stored), len(stored), content)
        return refs

    def _discard(self, index: int, attempt: str, error: BaseException) -> None:
        try:
            if not self._visible(index):
                self.storage.delete(attempt)
                if not self.storage.list(self._at(index)):
                    self.storage.delete(self._at(index))
        except StorageError as second:
            error.add_note(f"and the unfinished attempt stays behind: {second}")

    def _make_room(self, index: int) -> str | None:
        """Hash of the round before; whatever lies where the new one goes is put aside, unless it is a whole round."""
        before = self.read(index - 1) if index else None
        rounds = self._rounds()
        if index in rounds and not next(flaw for other, _, flaw in self._scan(objects=True) if other == index):
            raise StorageError(f"{self._full(index)} is already committed")
        for other in rounds:
            if other >= index:
                self._put_aside(other, f"in the way of round {index}, which is committed anew")
        return before.sha256 if before else None

    def _scan(self, objects: bool) -> Iterator[tuple[int, Commit | None, str]]:
        """All rounds in order: number, commit where COMMIT.json is whole, and what is wrong with it; "" if nothing."""
        before: Commit | None = None
        expected = 0
        for index in self._rounds():
            commit, flaw = None, ""
            try:
                commit = self.read(index)
                if index != expected:
                    raise DamagedError(f"{self._full(expected)} is missing")
                if commit.previous != (before.sha256 if before else None):
                    raise DamagedError(f"{self._full(index)}/{RECORD} does not follow the round before it")
                if objects:
                    commit.verify()
            except DamagedError as error:
                flaw = str(error)
            yield index, commit, flaw
            before, expected = commit, index + 1

    def _prefix(self, objects: bool) -> tuple[list[Commit], dict[int, str]]:
        """The longest prefix of rounds that verify, and what is wrong with the round after it."""
        prefix: list[Commit] = []
        for index, commit, flaw in self._scan(objects):
            if commit is None or flaw:
                return prefix, {index: flaw}
            prefix.append(commit)
        return prefix, {}

    def _repair(self, last: int, unfit: Mapping[int, str]) -> None:
        rounds, hinted = self._rounds(), self._hinted()
        for index in rounds:
            if index > last:
                self._put_aside(index, unfit.get(index, f"follows round {last + 1}, which does not verify"))
        if hinted > last and hinted not in rounds:
            self._tell("lost", hinted, f"{LATEST} names round {hinted}, which is not there")
        for place in (self.path, *([self._at(last)] if last >= 0 else [])):
            for name in self.storage.list(place):
                if name.startswith(".") and name.endswith(".tmp"):  # of a killed writer
                    self.storage.delete(join(place, name))
        if hinted > last:
            self._write_hint(last)

    def _put_aside(self, index: int, reason: str) -> None:
        if not self._visible(index) and index > self._hinted():
            self.storage.delete(self._at(index))
            self._tell("leftover-removed", index, "an attempt that never committed")
            return
        taken = self.storage.list(join(self.path, QUARANTINE))
        names = [f"{index:06d}", *(f"{index:06d}-{number + 1}" for number in range(len(taken)))]
        target = join(self.path, QUARANTINE, next(name for name in names if name not in taken))
        # Written before the move: a crash in between must not leave an entry without a reason.
        self.storage.write_json(join(self._at(index), REASON), {"round": index, "reason": reason})
        self.storage.move(self._at(index), target)
        self._tell("quarantined", index, reason, place=self.storage.full(target))

    def _tell(self, event: str, index: int, reason: str, **more: str) -> None:
        self.events.append({"event": event, "log": self.path, "round": index, "reason": reason, **more})
        if self._on_event:
            self._on_event(self.events[-1])

    def _at(self, index: int) -> str:
        return join(self.path, folder(index))

    def _full(self, index: int) -> str:
        return self.storage.full(self._at(index))

    def _rounds(self) -> list[int]:
        names = self.storage.list(join(self.path, "rounds"))
        return sorted(int(name) for name in names if name.isdecimal() and name == f"{int(name):06d}")

    def _visible(self, index: int) -> bool:
        return self.storage.exists(join(self._at(index), RECORD))

    def _hinted(self) -> int:
        try:
            return int(self.storage.read_bytes(join(self.path, LATEST)))
        except (MissingFileError, ValueError):
            return -1

    def _write_hint(self, index: int) -> None:
        # Only a hint, so it need not survive a power cut.
        self.storage.write_bytes(join(self.path, LATEST), f"{index}\n".encode(), durable=False)
