"""One writer per artifact: an exclusive LOCK file with a heartbeat; abandoned locks are taken over.

A lock is abandoned if its process is gone (same machine, same boot) or, on another machine, if its heartbeat
stands still for `STALE_S` of the waiter's own clock; nobody's wall clock is compared. A process that is
alive on this machine keeps its lock even while it is stopped or busy. `machine` and `started` give processes an
identity that survives reused pids, jumping clocks and containers.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped,unused-ignore]

from fedtailor.core.errors import LockedError, StorageError
from fedtailor.storage.files import MissingFileError, Storage, join

LOCK = "LOCK"
HEARTBEAT_S, STALE_S = 3.0, 30.0
_POLL_S, _REMIND_S = 0.2, 30.0
_log = logging.getLogger(__name__)


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
        if Path("/proc/self/stat").exists() or not psutil.pid_exists(pid):
            return None
        return str(round(psutil.Process(pid).create_time()))
    # The name in parentheses may hold spaces; fields are counted after it: state is 3, starttime 22.
    fields = text.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


@dataclass(frozen=True)
class LockHolder:
    """The process that holds a lock, as the LOCK file has it.

    Args:
        owner: run id.
        host: name of its machine, for messages.
        pid: its process id.
        started: when the process started, see `started`.
        machine: machine on which its pid is valid, see `machine`.
        token: unique to this acquisition.
    """

    owner: str
    host: str
    pid: int
    started: str
    machine: str
    token: str

    @classmethod
    def here(cls, owner: str) -> LockHolder:
        """This process."""
        pid = os.getpid()
        return cls(owner, socket.gethostname(), pid, started(pid) or "", machine(), secrets.token_hex(8))

    @property
    def present(self) -> bool | None:
        """Whether the process runs; None if it belongs to another machine, so that nobody here can know."""
        return started(self.pid) == self.started if self.machine == machine() else None

    def __str__(self) -> str:
        return f"run '{self.owner}' (process {self.pid} on {self.host})"


class Lock:
    """Holds ``path/LOCK`` for the time of a with block.

    Args:
        storage: storage of the LOCK file.
        path: folder to lock, e.g. ``artifacts/base-0123``.
        owner: run id, shown to others.
        on_wait: given: wait while somebody else holds the lock, and call it with who does, now and then. None: refuse.
        on_event: called at a takeover: ``{"event": "lock-taken-over", "lock": path, "from": holder, ...}``.
        heartbeat_s: seconds between signs of life.
        stale_s: seconds without one after which another machine's lock is abandoned.

    Raises:
        LockedError: (as the block begins) somebody alive holds the lock, and nobody said how to wait; names the run,
            process and host.
        StorageError: the store cannot lock.
    """

    def __init__(
        self,
        storage: Storage,
        path: str,
        owner: str,
        on_wait: Callable[[str], None] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        stale_s: float = STALE_S,
    ) -> None:
        self.holder = LockHolder.here(owner)
        self._storage, self._path = storage, join(path, LOCK)
        self._on_wait, self._on_event, self._heartbeat_s, self._stale_s = on_wait, on_event, heartbeat_s, stale_s
        self._seen: dict[str, tuple[bytes, float]] = {}  # token to its lock's last heartbeat, and when that came
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock-heartbeat", daemon=True)

    def __enter__(self) -> Lock:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._delete(self.holder)
        self._thread.join()
        # After the last beat: an earlier deletion could be undone by it.
        self._storage.delete(_beats(self._path, self.holder))

    def _acquire(self) -> None:
        reminded = float("-inf")
        while not self._create(self._path):
            other = _read(self._storage, self._path)
            if other is None:
                continue
            alive = self._alive(other)
            if alive is False:
                self._take_over(other)
                continue
            where = self._storage.full(self._path)
            if alive and self._on_wait is None:
                raise LockedError(f"{where} is held by {other}; wait for it, stop it, or use another 'storage'")
            if self._on_wait and time.monotonic() - reminded > _REMIND_S:
                reminded = time.monotonic()
                self._on_wait(f"waiting for {other}, which holds {where}")
            time.sleep(_POLL_S)

    def check(self) -> None:
        """Confirms that the lock is still ours; a `CommitLog` takes this as its guard.

        Raises:
            StorageError: another run took it over, e.g. while this machine was cut off.
        """
        now = _read(self._storage, self._path)
        if now is None or now.token != self.holder.token:
            where = self._storage.full(self._path)
            raise StorageError(f"{where} is no longer ours but {now or 'free'}; this run must stop")

    def _beat(self) -> None:
        """Counts in a file of its own, so that it cannot overwrite another's lock."""
        count = 0
        while not self._done.wait(self._heartbeat_s):
            count += 1
            try:
                self._storage.write_bytes(_beats(self._path, self.holder), str(count).encode(), durable=False)
            except StorageError as error:
                _log.warning("no heartbeat: %s", error)

    def _delete(self, holder: LockHolder) -> bool:
        """Deletes the LOCK file if it is still the holder's."""
        now = _read(self._storage, self._path)
        if now is None or now.token != holder.token:
            return False
        self._storage.delete(self._path)
        return True

    def _create(self, path: str) -> bool:
        return self._storage.create(path, json.dumps(asdict(self.holder)).encode())

    def _alive(self, other: LockHolder) -> bool | None:
        """Whether the lock's process is there; None: not yet known."""
        if other.present is not None:
            return other.present
        try:
            beat = self._storage.read_bytes(_beats(self._path, other))
        except MissingFileError:
            beat = b""
        now, before = time.monotonic(), self._seen.get(other.token)
        if before is None or before[0] != beat:
            self._seen[other.token] = beat, now
            return True if before else None
        return False if now - before[1] > self._stale_s else None

    def _take_over(self, stale: LockHolder) -> None:
        # Only the creator of this claim may delete the lock with this token, which never comes back; so a
        # slower rival cannot delete the lock that we are about to make.
        claim = f"{self._path}-{stale.token}.claim"
        if not self._create(claim):
            rival = _read(self._storage, claim)
            if rival is not None and self._alive(rival) is False:
                self._storage.delete(claim)
            time.sleep(_POLL_S)
            return
        try:
            if self._delete(stale):
                self._storage.delete(_beats(self._path, stale))
                why = "its process is gone" if stale.present is False else f"no heartbeat for {self._stale_s:g} s"
                _log.warning("took over the lock %s of %s: %s", self._path, stale, why)
                if self._on_event:
                    event = {"event": "lock-taken-over", "lock": self._path, "from": str(stale), "by": str(self.holder)}
                    self._on_event({**event, "reason": why})
        finally:
            self._storage.delete(claim)


def lock_holder(storage: Storage, path: str) -> tuple[LockHolder, float] | None:
    """Who holds ``path/LOCK``, for display: nothing is taken over.

    Returns:
        The holder and the seconds since its last sign of life, by this machine's clock and the store's; None if the
        lock is free.
    """
    name = join(path, LOCK)
    holder = _read(storage, name)
    if holder is None:
        return None
    signs = [time_of for file in (name, _beats(name, holder)) if (time_of := storage.modified(file)) is not None]
    return holder, max(0.0, time.time() - max(signs, default=time.time()))


def _beats(path: str, holder: LockHolder) -> str:
    return f"{path}-{holder.token}.beat"


def _read(storage: Storage, path: str) -> LockHolder | None:
    try:
        return LockHolder(**storage.read_json(path))
    except MissingFileError:
        return None
    except TypeError as error:
        where = storage.full(path)
        raise StorageError(f"{where} is not a lock; delete it if no run is active") from error
