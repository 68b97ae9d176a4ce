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
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType

from fedtailor.core.errors import ConfigError
from fedtailor.core.messages import SegmentJob

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
