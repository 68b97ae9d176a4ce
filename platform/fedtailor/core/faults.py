"""Fault plans: what tests break, and where. One mechanism for the commit protocol, the workers and their replies.

Nothing happens unless ``FEDTAILOR_FAULT`` is set. It holds one or several faults, separated by ``;``:

- ``[ACTION:]POINT@N``: at the N-th pass of a commit point (`COMMIT_POINTS`) this process is killed, or, with one of
  `ERRNOS` as action, the operating system is made to fail there: ``enospc:commit:before-record@3``.
- ``KIND [KEY=VALUE ...]``: a worker does something wrong (`KINDS`) wherever all the keys fit:
  ``kill stage=base round=4 client=#1 step=2; nan stage=base round=7 client=seen/amh/00``.

Keys: ``stage`` (key or its beginning, ``base``, ``strategy/fedp2eft``), ``round``, ``segment``, ``client`` (an id, or
``#2`` for the third of a segment; none: every client), ``share`` of all clients instead (the same ones in every
round), ``attempt`` (a number, 0 if not given, so that the retry succeeds; ``always``), ``step`` (forward pass of the
client's group at which a process fault strikes; 0: before it starts), ``seconds``, ``factor``, ``mb``.

What a worker does when a fault plan says so; only tests ever come here.

Named points of the commit protocol at which a fault plan stops the process or fails the storage.

The plan is read by `core.faults`; without one, `point` costs one look-up in the environment.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped,unused-ignore]
from torch import nn

from fedtailor.core.errors import ConfigError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult

VARIABLE = "FEDTAILOR_FAULT"

COMMIT_POINTS: tuple[str, ...] = (
    "commit:start",
    "commit:object-written",
    "commit:objects-verified",
    "commit:before-record",
    "commit:record-temp",
    "commit:after-record",
    "commit:latest",
    "prune:before",
    "prune:recorded",
    "prune:after",
)
"""In the order in which a commit and then a pruning pass them; ``commit:object-written`` once per object."""

ERRNOS = ("enospc", "edquot", "erofs", "eacces", "efbig", "eio", "estale")
"""Ways in which storage may fail at a commit point."""

PROCESS: Mapping[str, str] = MappingProxyType(
    {
        "kill": "SIGKILL to itself",
        "hang": "sleep for ever",
        "stop": "SIGSTOP to itself",
        "slow": "sleep `seconds`, then go on",
        "hog": "take `mb` megabytes of memory in steps, hold them `seconds`, then go on",
        "raise": "raise RuntimeError",
    }
)
"""While a group of clients is trained."""

LATE: Mapping[str, str] = MappingProxyType({"kill-after": "SIGKILL to itself when all is computed, before it answers"})

UPDATE: Mapping[str, str] = MappingProxyType(
    {
        "nan": "one NaN in the client's parameters",
        "inf": "one Inf in the client's parameters",
        "flip": "received - (sent - received): the update with its sign changed",
        "scale": "received + `factor` (sent - received)",
        "absent": "the client's result is set aside before anybody looks at it",
    }
)
"""To what a client has trained."""

REPLY: Mapping[str, str] = MappingProxyType(
    {
        "shape": "the sum has one number less",
        "dtype": "the sum is float16",
        "poison": "the sum has a NaN",
        "missing": "there is no sum",
        "foreign": "a client that nobody asked for is counted",
        "twice": "the first client is counted twice",
        "lost": "the last client is neither counted nor reported as failed",
        "rows-missing": "the first client has no metrics",
        "rows-foreign": "there are metrics of another client",
        "rows-twice": "the first metric occurs twice",
        "private": "a client's private row has one number more",
    }
)
"""To a whole segment's answer."""

KINDS: Mapping[str, str] = MappingProxyType({**PROCESS, **LATE, **UPDATE, **REPLY})

ALWAYS = -1


@dataclass(frozen=True)
class CommitFault:
    """Strikes at the ``hit``-th pass of a point; ``action`` is ``kill`` or one of `ERRNOS`."""

    action: str
    point: str
    hit: int


@dataclass(frozen=True)
class WorkerFault:
    """What a worker does wrong, and where; the module's docstring explains the fields."""

    kind: str
    stage: str | None = None
    round: int | None = None
    segment: int | None = None
    client: str | None = None
    share: float = 1.0
    attempt: int = 0
    step: int = 0
    seconds: float = 1.0
    factor: float = 1e6
    mb: int = 256

    def meets(self, job: SegmentJob) -> bool:
        """Whether it belongs to this segment and try."""
        return (
            (self.stage is None or f"{job.stage}/".startswith(f"{self.stage}/"))
            and self.round in (None, job.round)
            and self.segment in (None, job.index)
            and self.attempt in (ALWAYS, job.attempt)
            and any(self.strikes(job, client) for client in job.clients)
        )

    def strikes(self, job: SegmentJob, client: str) -> bool:
        """Whether it is this client's, in a segment that it meets."""
        if self.share < 1:
            digest = hashlib.blake2s(f"{self.kind}/{client}".encode(), digest_size=4).digest()
            return int.from_bytes(digest, "little") < self.share * 2**32
        if self.client is None:
            return True
        if self.client.startswith("#"):
            place = int(self.client[1:])
            return place < len(job.clients) and job.clients[place] == client
        return self.client == client


@dataclass(frozen=True)
class FaultPlan:
    """All faults of a process."""

    commits: tuple[CommitFault, ...] = ()
    workers: tuple[WorkerFault, ...] = field(default=())


def planned() -> FaultPlan | None:
    """The plan in the environment; None, at the price of one look-up, where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    text = os.environ.get(VARIABLE)
    return parse(text) if text else None


@lru_cache(maxsize=16)
def parse(text: str) -> FaultPlan:
    """Reads a plan.

    >>> parse("enospc:commit:start@2; nan round=3 client=#1").workers[0].round
    3

    Raises:
        ConfigError: lists every fault that is not understood, with what is allowed.
    """
    commits, workers, problems = [], [], []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            if "@" in part.split()[0]:
                commits.append(_commit_fault(part))
            else:
                workers.append(_worker_fault(part))
        except ValueError as error:
            problems.append(f"{VARIABLE}='{part}': {error}")
    if problems or not (commits or workers):
        raise ConfigError(problems or f"{VARIABLE}='{text}' names no fault")
    return FaultPlan(tuple(commits), tuple(workers))


def _commit_fault(text: str) -> CommitFault:
    name, _, count = text.rpartition("@")
    action, _, rest = name.partition(":")
    action, point = (action, rest) if action in ERRNOS else ("kill", name)
    if point not in COMMIT_POINTS or not count.isdecimal() or int(count) < 1:
        raise ValueError(f"write [{'|'.join(ERRNOS)}:]<point>@<n>, n >= 1; points: {', '.join(COMMIT_POINTS)}")
    return CommitFault(action, point, int(count))


_NUMBERS: Mapping[str, type[int] | type[float]] = MappingProxyType(
    {"round": int, "segment": int, "attempt": int, "step": int, "mb": int, "seconds": float, "factor": float,
     "share": float}
)  # fmt: skip

_KEYS = ("stage", "client", *_NUMBERS)


def _worker_fault(text: str) -> WorkerFault:
    kind, *pairs = text.split()
    if kind not in KINDS:
        raise ValueError(
            f"'{kind}' is no kind of fault (allowed: {', '.join(KINDS)}, or <point>@<n> with the points: "
            f"{', '.join(COMMIT_POINTS)})"
        )
    fields: dict[str, str | int | float] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in _KEYS or not equals or not value or key in fields:
            raise ValueError(f"'{pair}': write each of {', '.join(_KEYS)} at most once as key=value")
        fields[key] = _value(key, value)
    return WorkerFault(kind, **fields)  # type: ignore[arg-type]


def _value(key: str, value: str) -> str | int | float:
    if key == "attempt" and value == "always":
        return ALWAYS
    if key == "client" and value.startswith("#") and not value[1:].isdecimal():
        raise ValueError(f"'client={value}': write #<n>, n >= 0, or a client's id")
    if key not in _NUMBERS:
        return value
    try:
        number = _NUMBERS[key](value)
    except ValueError:
        raise ValueError(f"'{key}={value}': not a number") from None
    if number < 0 and key != "factor":
        raise ValueError(f"'{key}={value}': must not be negative")
    if key == "share" and number > 1:
        raise ValueError(f"'share={value}': at most 1")
    return number


STRANGER = "nobody/asked/00"

_HOG_STEP_MB = 64


class Sabotage:
    """The faults of one segment.

    Args:
        plan: of this process.
        job: the segment.
    """

    def __init__(self, plan: FaultPlan, job: SegmentJob) -> None:
        self._job = job
        self._faults = [fault for fault in plan.workers if fault.meets(job)]

    @contextmanager
    def during(self, clients: Sequence[str], model: nn.Module) -> Iterator[None]:
        """Process faults of a group: before it starts, or at its n-th forward pass."""
        faults = self._of(PROCESS, clients)
        for fault in faults:
            if not fault.step:
                strike(fault)
        later = [fault for fault in faults if fault.step]
        if not later:
            yield
            return
        passes = 0

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1
            for fault in later:
                if fault.step == passes:
                    strike(fault)

        hook = model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def update(self, client: str, row: FloatArray, received: FloatArray | None) -> FloatArray | None:
        """A client's SHARED row (P,) as it is to be sent; None: it is set aside."""
        for fault in self._of(UPDATE, [client]):
            start = np.zeros_like(row) if received is None else np.asarray(received, np.float32)
            if fault.kind == "absent":
                return None
            if fault.kind in ("nan", "inf"):
                row = row.copy()
                row[:1] = np.nan if fault.kind == "nan" else np.inf
            else:
                factor = -1.0 if fault.kind == "flip" else fault.factor
                row = (start + factor * (row - start)).astype(np.float32)
        return row

    def reply(self, result: SegmentResult) -> SegmentResult:
        """The segment's answer with whatever is to be wrong with it; does not return after a ``kill-after``."""
        for fault in self._of(REPLY, self._job.clients):
            result = _damaged(fault.kind, result)
        for fault in self._faults:
            if fault.kind == "kill-after":
                _kill()
        return result

    def _of(self, kinds: Any, clients: Sequence[str]) -> list[WorkerFault]:
        return [f for f in self._faults if f.kind in kinds and any(f.strikes(self._job, c) for c in clients)]


def strike(fault: WorkerFault) -> None:
    """Does what a process fault says, to this process."""
    if fault.kind == "kill":
        _kill()
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "hang":
        _hang()
    elif fault.kind == "slow":
        time.sleep(fault.seconds)
    elif fault.kind == "hog":
        _hog(fault.mb, fault.seconds)
    else:
        raise RuntimeError("a fault plan said so")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _hang() -> None:
    while True:
        time.sleep(3600)


def _hog(megabytes: int, seconds: float) -> None:
    """Takes memory, but never the last gigabyte of the machine."""
    held: list[Any] = []
    while len(held) * _HOG_STEP_MB < megabytes and psutil.virtual_memory().available > 2**30:
        held.append(np.ones(_HOG_STEP_MB * 2**17))
    time.sleep(seconds)


def _damaged(kind: str, result: SegmentResult) -> SegmentResult:
    first = result.valid[0]
    if kind in ("shape", "dtype", "poison"):
        return replace(result, partial=_map_arrays(result.partial, kind))
    if kind == "missing":
        return replace(result, partial=None)
    if kind == "foreign":
        return replace(result, valid=(*result.valid, STRANGER))
    if kind == "twice":
        return replace(result, valid=(first, *result.valid))
    if kind == "lost":
        last = result.valid[-1]
        rows = [row for row in result.metrics if row["client"] != last]
        return replace(result, valid=result.valid[:-1], metrics=rows)
    if kind == "private":
        rows_of = {c: np.append(row, np.float32(0)) if c == first else row for c, row in result.private.items()}
        return replace(result, private=rows_of or {first: np.zeros(1, np.float32)})
    if kind == "rows-missing":
        return replace(result, metrics=[row for row in result.metrics if row["client"] != first])
    more = {"rows-foreign": {"client": STRANGER}, "rows-twice": {}}[kind]
    return replace(result, metrics=[*result.metrics, result.metrics[0] | more])


def _map_arrays(value: Any, kind: str) -> Any:
    """Damages the first array of an aggregator's state."""
    if isinstance(value, np.ndarray):
        if kind == "shape":
            return value[:-1].copy()
        if kind == "dtype":
            return value.astype(np.float16)
        broken = value.copy()
        broken[:1] = np.nan
        return broken
    if isinstance(value, list):
        (client, row, weight), *rest = value
        return [(client, _map_arrays(row, kind), weight), *rest]
    assert is_dataclass(value)
    name = next(f.name for f in fields(value) if isinstance(getattr(value, f.name), np.ndarray))
    return replace(value, **{name: _map_arrays(getattr(value, name), kind)})  # type: ignore[type-var]


__all__ = ["POINTS", "VARIABLE", "point"]

POINTS = COMMIT_POINTS

_hits: Counter[str] = Counter()


def point(name: str) -> None:
    """Marks a step of the commit protocol.

    Raises:
        OSError: a full or read-only disk, if the environment asks for it here.
        ConfigError: ``FEDTAILOR_FAULT`` cannot be read.
    """
    plan = planned()
    if plan is None or not plan.commits:
        return
    if name not in POINTS:
        raise ValueError(f"'{name}' is not one of {POINTS}")
    _hits[name] += 1
    for fault in plan.commits:
        if (fault.point, fault.hit) != (name, _hits[name]):
            continue
        if fault.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, fault.action.upper())
        raise OSError(code, os.strerror(code), name)
