"""A stage's artifact folder as a log of numbered commits: a round exists if and only if its COMMIT verifies.

Objects go under names unique to the attempt, are re-opened and checked, and COMMIT.json, written last,
names them with their hashes and the hash of the commit before. See DESIGN.md section 8.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from fedtailor.core.errors import StorageError
from fedtailor.core.faults import point
from fedtailor.storage.commit import (
    RECORD,
    Commit,
    DamagedError,
    ObjectRef,
    compose,
    folder,
    load,
    prune_round,
    quarantine,
    sweep,
)
from fedtailor.storage.files import MissingFileError, Storage, join, storage_errors
from fedtailor.storage.payloads import Payload, encode, extent, inspect, sha256

LATEST = "LATEST"


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
            with storage_errors(f"committing {self.storage.full(self._at(index))}"):
                point("commit:start")
                refs = self._write(attempt, objects)
                point("commit:objects-verified")
                data = compose(index, previous, record, refs)
                point("commit:before-record")
                self._publish(index, data)
                point("commit:after-record")
                self._write_hint(index)
                point("commit:latest")
        except BaseException as error:
            self._discard(index, attempt, error)
            raise
        return load(self.storage, self.path, index)

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
        newest = None
        for index in reversed(self._rounds()):
            try:
                newest = self._usable(index)
                break
            except DamagedError as error:
                unfit[index] = str(error)
        if newest:
            self._check_chain(newest)
        if repair:
            self._repair(-1 if newest is None else newest.index, unfit)
        return newest

    def all(self, repair: bool = False, objects: bool = True) -> list[Commit]:
        """The longest prefix 0..n of rounds that verify, chain included.

        Args:
            repair: move whatever follows the prefix to ``quarantine/``; needs the lock.
            objects: read the objects too; False checks COMMIT.json files alone.
        """
        prefix, unfit = self._scan(objects)
        if repair:
            self._repair(len(prefix) - 1, unfit)
        return prefix

    def damage(self) -> str | None:
        """Why a round that was once committed no longer verifies, or None; changes nothing."""
        prefix, unfit = self._scan(objects=True)
        known = max([self._hinted(), *filter(self._visible, self._rounds())], default=-1) + 1
        if len(prefix) == known:
            return None
        where = self.storage.full(self._at(len(prefix)))
        state = "was being written" if self._visible(len(prefix)) else "is missing"
        return next(iter(unfit.values()), f"{where}/{RECORD} {state}")

    def prune(self, keep: int, heavy: Sequence[str]) -> None:
        """Deletes objects whose name starts with one of ``heavy`` from all but the newest ``keep`` rounds.

        COMMIT.json, its hashes and all other objects stay; a sidecar written first says what may be gone.

        Raises:
            StorageError: keep < 1, or a file cannot be deleted.
        """
        if keep < 1:
            raise StorageError(f"prune: keep must be at least 1, got {keep}")
        for index in self._rounds()[:-keep]:
            if index >= self._pruned_below:
                with storage_errors(f"pruning {self.storage.full(self._at(index))}"):
                    prune_round(load(self.storage, self.path, index), tuple(heavy))
                self._pruned_below = index + 1

    def _write(self, attempt: str, objects: Mapping[str, Payload]) -> dict[str, ObjectRef]:
        written: dict[str, tuple[str, bytes, Payload]] = {}
        for given, payload in objects.items():
            name, data = encode(given, payload)
            if name in written:
                raise StorageError(f"two objects of one commit are named '{name}'")
            written[name] = join(attempt, name), data, payload
            self.storage.write_new(written[name][0], data)
            point("commit:object-written")
        self.storage.flush(path for path, _, _ in written.values())
        return {name: self._verified(name, *entry) for name, entry in sorted(written.items())}

    def _verified(self, name: str, path: str, data: bytes, payload: Payload) -> ObjectRef:
        stored = self.storage.read_bytes(path)
        if stored != data:
            raise StorageError(f"{self.storage.full(path)} reads back differently from what was written")
        seen, meant = inspect(name, stored), extent(name, payload)
        if meant is not None and seen.extent != meant:
            raise StorageError(f"{self.storage.full(path)} holds {seen.extent} after writing {meant}")
        return ObjectRef(path[len(self.path) + 1 :], sha256(stored), len(stored), seen.content)

    def _publish(self, index: int, data: bytes) -> None:
        if self._guard:
            self._guard()
        path = join(self._at(index), RECORD)
        if not self.storage.create(path, data, lambda: point("commit:record-temp")):
            raise StorageError(f"{self.storage.full(path)} was committed by another process meanwhile")

    def _discard(self, index: int, attempt: str, error: BaseException) -> None:
        try:
            if not self._visible(index):
                self.storage.delete(attempt)
                if not self.storage.list(self._at(index)):
                    self.storage.delete(self._at(index))
        except StorageError as second:
            error.add_note(f"and the unfinished attempt stays behind: {second}")

    def _make_room(self, index: int) -> str | None:
        before = load(self.storage, self.path, index - 1) if index else None
        for other in self._rounds():
            if other == index:
                with suppress(DamagedError):
                    self._linked(index, before, objects=True)
                    raise StorageError(f"{self.storage.full(self._at(index))} is already committed")
            if other >= index:
                self._put_aside(other, f"in the way of round {index}, which is committed anew")
        return before.sha256 if before else None

    def _scan(self, objects: bool) -> tuple[list[Commit], dict[int, str]]:
        """The longest prefix of rounds that verify, and what is wrong with the round after it."""
        prefix: list[Commit] = []
        for index in self._rounds():
            try:
                prefix.append(self._linked(index, prefix[-1] if prefix else None, objects))
            except DamagedError as error:
                return prefix, {index: str(error)}
        return prefix, {}

    def _usable(self, index: int) -> Commit:
        commit = load(self.storage, self.path, index)
        if not commit.complete:
            raise DamagedError(f"{self.storage.full(self._at(index))}: its state was pruned")
        commit.verify()
        return commit

    def _linked(self, index: int, before: Commit | None, objects: bool) -> Commit:
        expected = before.index + 1 if before else 0
        if index != expected:
            raise DamagedError(f"{self.storage.full(self._at(expected))} is missing")
        commit = load(self.storage, self.path, index)
        if commit.previous != (before.sha256 if before else None):
            where = self.storage.full(self._at(index))
            raise DamagedError(f"{where}/{RECORD} does not follow the round before it")
        if objects:
            commit.verify()
        return commit

    def _check_chain(self, newest: Commit) -> None:
        chain, unfit = self._scan(objects=False)
        if len(chain) > newest.index:
            return
        raise DamagedError(
            f"{'; '.join(unfit.values())}; round {newest.index} is whole, but its history is not. Restore that file, "
            f"or move {self.storage.full(self.path)} away to compute the stage again"
        )

    def _repair(self, last: int, unfit: Mapping[int, str]) -> None:
        rounds, hinted = self._rounds(), self._hinted()
        for index in rounds:
            if index > last:
                self._put_aside(index, unfit.get(index, f"follows round {last + 1}, which does not verify"))
        if hinted > last and hinted not in rounds:
            self._tell("lost", hinted, f"{LATEST} names round {hinted}, which is not there")
        for place in (self.path, *([self._at(last)] if last >= 0 else [])):
            sweep(self.storage, place)
        if hinted > last:
            self._write_hint(last)

    def _put_aside(self, index: int, reason: str) -> None:
        if self._visible(index) or index <= self._hinted():
            place = quarantine(self.storage, self.path, index, reason)
            self._tell("quarantined", index, reason, place=self.storage.full(place))
        else:
            self.storage.delete(self._at(index))
            self._tell("leftover-removed", index, "an attempt that never committed")

    def _tell(self, event: str, index: int, reason: str, **more: str) -> None:
        self.events.append({"event": event, "log": self.path, "round": index, "reason": reason, **more})
        if self._on_event:
            self._on_event(self.events[-1])

    def _at(self, index: int) -> str:
        return join(self.path, folder(index))

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
