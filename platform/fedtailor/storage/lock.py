"""One writer per artifact.

One writer per artifact: an exclusive LOCK file with a heartbeat; abandoned locks are taken over.

A lock is abandoned if its process is gone (same machine, same boot) or, on another machine, if its heartbeat
stands still for `STALE_S` of the waiter's own clock; nobody's wall clock is compared. A process that is
alive on this machine keeps its lock even while it is stopped or busy.

Which process on which machine: an identity that survives reused pids, jumping clocks and containers.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

from fedtailor.core.errors import LockedError, StorageError
from fedtailor.storage.backends import MissingFileError
from fedtailor.storage.files import Storage, join


@lru_cache(maxsize=1)
def machine() -> str:
    """Boot and pid namespace: equal only where equal pids mean the same process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        # Not Linux: the host's name and its boot time, rounded because clocks are corrected.
        return f"{os.uname().nodename}/{round(psutil.boot_time(), -2)}"


def started(pid: int) -> str | None:
    """When a process started (clock ticks since boot on Linux), or None if it does not run."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self/stat").exists() else _started_elsewhere(pid)
    # The name in parentheses may hold spaces; fields are counted after it: state is 3, starttime 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _started_elsewhere(pid: int) -> str | None:
    try:
        return str(round(psutil.Process(pid).create_time()))
    except psutil.NoSuchProcess:
        return None


LOCK = "LOCK"

HEARTBEAT_S, STALE_S = 3.0, 30.0

_POLL_S, _REMIND_S = 0.2, 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Who holds a lock.

    Args:
        owner: run id.
        started: when the process started, see `processes.started`.
        machine: where its pid is valid, see `processes.machine`.
        token: of this acquisition.
    """

    owner: str
    host: str
    pid: int
    started: str
    machine: str
    token: str

    @classmethod
    def here(cls, owner: str) -> Owner:
        """This process."""
        pid = os.getpid()
        return cls(owner, socket.gethostname(), pid, started(pid) or "", machine(), secrets.token_hex(8))

    @property
    def present(self) -> bool | None:
        """Whether the process runs; None if it belongs to another machine, so that nobody here can know."""
        return started(self.pid) == self.started if self.machine == machine() else None

    def __str__(self) -> str:
        return f"run '{self.owner}' (process {self.pid} on {self.host})"


class HeldLock:
    """A lock that this process holds."""

    def __init__(self, storage: Storage, path: str, owner: Owner) -> None:
        self._storage, self._path, self.owner = storage, path, owner
        self._done = threading.Event()

    def check(self) -> None:
        """Confirms that the lock is still ours; a `CommitLog` takes this as its guard.

        Raises:
            StorageError: another run took it over, e.g. while this machine was cut off.
        """
        found = _read(self._storage, self._path)
        if found is None or found.token != self.owner.token:
            where = self._storage.full(self._path)
            raise StorageError(f"{where} is no longer ours but {found or 'free'}; this run must stop")

    def beat(self, every: float) -> None:
        """Counts in a file of its own (so that it cannot overwrite another's lock) until `release`."""
        count = 0
        while not self._done.wait(every):
            count += 1
            try:
                self._storage.write_bytes(_beats(self._path, self.owner), str(count).encode(), durable=False)
            except StorageError as error:
                _log.warning("no heartbeat: %s", error)

    def release(self) -> None:
        """Gives the lock back, if it is still ours."""
        self._done.set()
        found = _read(self._storage, self._path)
        if found is not None and found.token == self.owner.token:
            self._storage.delete(self._path)
        self._storage.delete(_beats(self._path, self.owner))


@contextmanager
def lock(
    storage: Storage,
    path: str,
    owner: str,
    on_wait: Callable[[str], None] | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    heartbeat_s: float = HEARTBEAT_S,
    stale_s: float = STALE_S,
) -> Iterator[HeldLock]:
    """Holds ``path/LOCK`` for the time of a with block.

    Args:
        storage: where.
        path: folder to lock, e.g. ``artifacts/base-0123``.
        owner: run id, shown to others.
        on_wait: given: wait while somebody else holds the lock, telling who, now and then. None: refuse.
        on_event: told of a takeover: ``{"event": "lock-taken-over", "lock": path, "from": owner, ...}``.
        heartbeat_s: seconds between signs of life.
        stale_s: seconds without one after which another machine's lock is abandoned.

    Raises:
        LockedError: somebody alive holds the lock (names the run, process and host).
        StorageError: the store cannot lock.
    """
    held = _Acquisition(storage, join(path, LOCK), Owner.here(owner), on_wait, on_event, stale_s).run()
    thread = threading.Thread(target=held.beat, args=(heartbeat_s,), name="lock-heartbeat", daemon=True)
    thread.start()
    try:
        yield held
    finally:
        held.release()
        thread.join()
        # The last beat may have come after `release` deleted the file.
        storage.delete(_beats(join(path, LOCK), held.owner))


class _Acquisition:
    def __init__(
        self,
        storage: Storage,
        path: str,
        me: Owner,
        on_wait: Callable[[str], None] | None,
        on_event: Callable[[dict[str, Any]], None] | None,
        stale_s: float,
    ) -> None:
        self.storage, self.path, self.me, self.stale_s = storage, path, me, stale_s
        self.on_wait, self.on_event = on_wait, on_event
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._reminded = float("-inf")

    def run(self) -> HeldLock:
        data = json.dumps(asdict(self.me)).encode()
        while not self.storage.create(self.path, data):
            found = _read(self.storage, self.path)
            if found is None:
                continue
            alive = self._alive(found)
            if alive is False:
                self._take(found)
                continue
            if alive and self.on_wait is None:
                where = self.storage.full(self.path)
                raise LockedError(f"{where} is held by {found}; wait for it, stop it, or use another 'storage'")
            self._remind(found)
            time.sleep(_POLL_S)
        return HeldLock(self.storage, self.path, self.me)

    def _alive(self, found: Owner) -> bool | None:
        if found.present is not None:
            return found.present
        beat, now = self._beat_of(found), time.monotonic()
        before = self._seen.get(found.token)
        if before is None or before[0] != beat:
            self._seen[found.token] = beat, now
            return True if before else None
        return False if now - before[1] > self.stale_s else None

    def _beat_of(self, found: Owner) -> bytes:
        try:
            return self.storage.read_bytes(_beats(self.path, found))
        except MissingFileError:
            return b""

    def _take(self, stale: Owner) -> None:
        # Only the creator of this claim may delete the lock with this token, which never comes back; so a
        # slower rival cannot delete the lock that we are about to make.
        claim = f"{self.path}-{stale.token}.claim"
        if not self.storage.create(claim, json.dumps(asdict(self.me)).encode()):
            rival = _read(self.storage, claim)
            if rival is not None and self._alive(rival) is False:
                self.storage.delete(claim)
            time.sleep(_POLL_S)
            return
        try:
            found = _read(self.storage, self.path)
            if found is not None and found.token == stale.token:
                self.storage.delete(self.path)
                self.storage.delete(_beats(self.path, stale))
                self._report(stale)
        finally:
            self.storage.delete(claim)

    def _report(self, stale: Owner) -> None:
        why = "its process is gone" if stale.present is False else f"no heartbeat for {self.stale_s:g} s"
        _log.warning("took over the lock %s of %s: %s", self.path, stale, why)
        if self.on_event:
            event = {"event": "lock-taken-over", "lock": self.path, "from": str(stale), "by": str(self.me)}
            self.on_event({**event, "reason": why})

    def _remind(self, found: Owner) -> None:
        now = time.monotonic()
        if self.on_wait and now - self._reminded > _REMIND_S:
            self._reminded = now
            self.on_wait(f"waiting for {found}, which holds {self.storage.full(self.path)}")


def _beats(path: str, owner: Owner) -> str:
    return f"{path}-{owner.token}.beat"


def _read(storage: Storage, path: str) -> Owner | None:
    try:
        return Owner(**storage.read_json(path))
    except MissingFileError:
        return None
    except TypeError as error:
        where = storage.full(path)
        raise StorageError(f"{where} is not a lock; delete it if no run is active") from error


@dataclass(frozen=True)
class Holder:
    """Who holds a lock, as a bystander sees it.

    Args:
        owner: the process.
        silent_s: seconds since its last sign of life, by this machine's clock and the store's.
    """

    owner: Owner
    silent_s: float

    @property
    def gone(self) -> bool:
        """Whether it stopped without a word. Of another machine's process only its silence is known."""
        return not self.owner.present if self.owner.present is not None else self.silent_s > STALE_S


def holder(storage: Storage, path: str) -> Holder | None:
    """Who holds ``path/LOCK``, for display: nothing is taken over. None if it is free."""
    name = join(path, LOCK)
    found = _read(storage, name)
    if found is None:
        return None
    signs = [time_of for file in (name, _beats(name, found)) if (time_of := storage.modified(file)) is not None]
    return Holder(found, max(0.0, time.time() - max(signs, default=time.time())))
