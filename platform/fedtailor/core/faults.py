"""Fault plans: what tests break, and where. One mechanism for the commit protocol, the workers and their replies.

Nothing happens unless ``FEDTAILOR_FAULT`` is set. It holds one or several faults, separated by ``;``:

- ``[ACTION:]POINT@N``: at the N-th pass of a commit point (`POINTS`) this process is killed, or, with one of `ERRNOS`
  as action, the operating system is made to fail there: ``enospc:commit:before-record@3``.
- ``KIND [KEY=VALUE ...]``: a worker does something wrong wherever all the keys (of `WorkerFault`) fit:
  ``kill stage=base round=4 client=#1 step=2; nan stage=base round=7 client=seen/amh/00``.

Clients that lie are no fault but configuration: `federated.updates`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import psutil  # type: ignore[import-untyped,unused-ignore]
from pydantic import Field

from fedtailor.core.config import Config, validate
from fedtailor.core.errors import ConfigError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult
from fedtailor.core.settings import Natural

if TYPE_CHECKING:
    from torch import nn

VARIABLE = "FEDTAILOR_FAULT"

POINTS: tuple[str, ...] = (
    "commit:start", "commit:object-written", "commit:objects-verified", "commit:before-record", "commit:record-temp",
    "commit:after-record", "commit:latest", "prune:before", "prune:recorded", "prune:after",
)  # fmt: skip
"""In the order in which a commit and then a pruning pass them; ``commit:object-written`` once per object."""

ERRNOS = ("enospc", "edquot", "erofs", "eacces", "efbig", "eio", "estale")
"""Ways in which storage may fail at a commit point."""

PROCESS = ("kill", "hang", "stop", "slow", "hog", "raise")
"""While a group of clients is trained."""

LATE = ("kill-after",)
"""When all is computed, before it is answered."""

UPDATE = ("nan", "inf", "absent")
"""To a client's SHARED parameters; ``absent``: its result is set aside before anybody looks at it."""

UNKNOWN_CLIENT = "nobody/asked/00"
_HOG_STEP_MB = 64
_passes: Counter[str] = Counter()
"""Commit points that this process has passed."""


class WorkerFault(Config):
    """What a worker does wrong, and where."""

    kind: str
    stage: str | None = None
    """Key or its beginning: ``base``, ``strategy/fedp2eft``."""
    round: Natural | None = None
    segment: Natural | None = None
    client: Annotated[str, Field(pattern=r"^(#\d+|[^#].*)$")] | None = None
    """An id, or ``#2`` for the third of a segment; None: every client."""
    attempt: Natural | Literal["always"] = 0
    """0: the retry succeeds."""
    step: Natural = 0
    """Forward pass of the client's group at which a process fault strikes; 0: before it starts."""
    seconds: Annotated[float, Field(ge=0)] = 1.0
    mb: Natural = 256

    def meets(self, job: SegmentJob, clients: Sequence[str]) -> bool:
        """Whether it strikes one of these clients of a segment, at this try."""
        return (
            (self.stage is None or f"{job.stage}/".startswith(f"{self.stage}/"))
            and self.round in (None, job.round)
            and self.segment in (None, job.index)
            and self.attempt in ("always", job.attempt)
            and bool(set(clients) & set(self._struck(job)))
        )

    def _struck(self, job: SegmentJob) -> Sequence[str]:
        if self.client is None:
            return job.clients
        return job.clients[int(self.client[1:]) :][:1] if self.client.startswith("#") else (self.client,)


@dataclass(frozen=True)
class FaultPlan:
    """All faults of a process.

    Args:
        commits: (commit point, its N-th pass) to ``kill`` or one of `ERRNOS`.
        workers: faults of workers, in the order of the plan.
    """

    commits: Mapping[tuple[str, int], str]
    workers: Sequence[WorkerFault]


def planned() -> FaultPlan | None:
    """The plan in the environment; None, at the price of one look-up, where there is none.

    Raises:
        ConfigError: it cannot be read.
    """
    text = os.environ.get(VARIABLE)
    return parse(text) if text else None


def parse(text: str) -> FaultPlan:
    """Reads a plan.

    >>> parse("enospc:commit:start@2; nan round=3 client=#1").commits
    {('commit:start', 2): 'enospc'}

    Raises:
        ConfigError: lists every fault that is not understood, with what is allowed.
    """
    commits, workers, problems = dict[tuple[str, int], str](), list[WorkerFault](), list[str]()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        try:
            if "@" in part.split()[0]:
                commits |= _commit_fault(part)
            else:
                workers.append(_worker_fault(part))
        except ConfigError as error:
            problems += [f"{VARIABLE}='{part}': {problem}" for problem in error.problems]
    if problems or not (commits or workers):
        raise ConfigError(problems or f"{VARIABLE}='{text}' names no fault")
    return FaultPlan(commits, workers)


def _commit_fault(text: str) -> dict[tuple[str, int], str]:
    name, _, count = text.rpartition("@")
    action, _, rest = name.partition(":")
    action, point = (action, rest) if action in ERRNOS else ("kill", name)
    if point not in POINTS or not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"write [{'|'.join(ERRNOS)}:]<point>@<n>, n >= 1; points: {', '.join(POINTS)}")
    return {(point, int(count)): action}


def _worker_fault(text: str) -> WorkerFault:
    kind, *pairs = text.split()
    if kind not in (kinds := (*PROCESS, *LATE, *UPDATE, *REPLY)):
        raise ConfigError(
            f"'{kind}' is no kind of fault (allowed: {', '.join(kinds)}, or <point>@<n> with the points: "
            f"{', '.join(POINTS)})"
        )
    values = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    if len({"kind", *values}) <= len(pairs) or not all(values.values()):
        raise ConfigError("write every key at most once, as key=value")
    return validate(WorkerFault, {"kind": kind, **values})


def point(name: str) -> None:
    """Marks a step of the commit protocol, one of `POINTS`.

    Raises:
        OSError: a full or read-only disk, if the environment asks for it here.
        ConfigError: ``FEDTAILOR_FAULT`` cannot be read.
    """
    plan = planned()
    if plan is None:
        return
    _passes[name] += 1
    action = plan.commits.get((name, _passes[name]))
    if action == "kill":
        _end(signal.SIGKILL)
    elif action is not None:
        code = getattr(errno, action.upper())
        raise OSError(code, os.strerror(code), name)


class Sabotage:
    """The faults of one segment.

    Args:
        plan: all faults of this process.
        job: the segment.
    """

    def __init__(self, plan: FaultPlan, job: SegmentJob) -> None:
        self._plan, self._job = plan, job

    @contextmanager
    def during(self, clients: Sequence[str], model: nn.Module) -> Iterator[None]:
        """Process faults of a group: before it starts, or at its n-th forward pass."""
        passes, faults = -1, self._of(PROCESS, clients)

        def count(*_: object) -> None:
            nonlocal passes
            passes += 1
            for fault in faults:
                if fault.step == passes:
                    strike(fault)

        count()
        hook = model.register_forward_pre_hook(count)
        try:
            yield
        finally:
            hook.remove()

    def update(self, client: str, row: FloatArray) -> FloatArray | None:
        """A client's SHARED row (P,) as it is to be sent; None: it is set aside."""
        for fault in self._of(UPDATE, [client]):
            if fault.kind == "absent":
                return None
            row = _spoilt(row, float(fault.kind))
        return row

    def reply(self, result: SegmentResult) -> SegmentResult:
        """The segment's answer with whatever is to be wrong with it; does not return after a ``kill-after``."""
        for fault in self._of((*REPLY, *LATE), self._job.clients):
            if fault.kind in LATE:
                _end(signal.SIGKILL)
            result = replace(result, **_REPLIES[fault.kind](result))
        return result

    def _of(self, kinds: Sequence[str], clients: Sequence[str]) -> list[WorkerFault]:
        return [f for f in self._plan.workers if f.kind in kinds and f.meets(self._job, clients)]


def strike(fault: WorkerFault) -> None:
    """Does what a process fault says, to this process."""
    if fault.kind == "raise":
        raise RuntimeError("a fault plan said so")
    if fault.kind in ("kill", "stop"):
        _end(signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        return
    memory = list[FloatArray]()
    # Never the last gigabyte of the machine.
    while fault.kind == "hog" and len(memory) * _HOG_STEP_MB < fault.mb and psutil.virtual_memory().available > 2**30:
        memory.append(np.ones(_HOG_STEP_MB * 2**17))
    time.sleep(fault.seconds)
    while fault.kind == "hang":
        time.sleep(3600)


def _end(number: int) -> None:
    os.kill(os.getpid(), number)


def _spoilt(row: FloatArray, value: float) -> FloatArray:
    row = row.copy()
    row[:1] = value
    return row


def _first_array(state: Any, change: Callable[[FloatArray], FloatArray]) -> Any:
    """An aggregator's state, or the rows that wait for one, with the first array changed."""
    if isinstance(state, list):
        (client, row, weight), *rest = state
        return [(client, change(row), weight), *rest]
    name = next(f.name for f in fields(state) if isinstance(getattr(state, f.name), np.ndarray))
    return replace(state, **{name: change(getattr(state, name))})


def _rows(result: SegmentResult, without: str) -> list[dict[str, Any]]:
    return [row for row in result.metrics if row["client"] != without]


def _longer(rows: Mapping[str, FloatArray], client: str) -> dict[str, FloatArray]:
    return {**rows, client: np.append(rows.get(client, np.zeros(0, np.float32)), np.float32(0))}


_REPLIES: Mapping[str, Callable[[SegmentResult], dict[str, Any]]] = {
    "shape": lambda r: {"partial": _first_array(r.partial, lambda row: row[:-1].copy())},
    "dtype": lambda r: {"partial": _first_array(r.partial, lambda row: row.astype(np.float16))},
    "poison": lambda r: {"partial": _first_array(r.partial, lambda row: _spoilt(row, np.nan))},
    "missing": lambda r: {"partial": None},
    "foreign": lambda r: {"valid": (*r.valid, UNKNOWN_CLIENT)},
    "twice": lambda r: {"valid": (r.valid[0], *r.valid)},
    "lost": lambda r: {"valid": r.valid[:-1], "metrics": _rows(r, r.valid[-1])},
    "rows-missing": lambda r: {"metrics": _rows(r, r.valid[0])},
    "rows-foreign": lambda r: {"metrics": [*r.metrics, r.metrics[0] | {"client": UNKNOWN_CLIENT}]},
    "rows-twice": lambda r: {"metrics": [*r.metrics, r.metrics[0]]},
    "private": lambda r: {"private": _longer(r.private, r.valid[0])},
}

REPLY = tuple(_REPLIES)
"""To a whole segment's answer."""
