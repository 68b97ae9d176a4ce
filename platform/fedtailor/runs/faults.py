"""Named points at which tests stop the process or fill the disk: the fault-injection hook.

Does nothing unless ``FEDTAILOR_FAULT`` is set: ``<name>@<n>`` kills this process with SIGKILL at the n-th
hit of that point, ``enospc:<name>@<n>`` raises ``OSError(ENOSPC)`` there instead.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

from fedtailor.core.errors import ConfigError

VARIABLE = "FEDTAILOR_FAULT"
POINTS: tuple[str, ...] = (
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

_hits: Counter[str] = Counter()


def point(name: str) -> None:
    """Marks a step of the commit protocol.

    Raises:
        OSError: disk full, if the environment asks for it here.
        ConfigError: ``FEDTAILOR_FAULT`` names no point.
    """
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return
    if name not in POINTS:
        raise ValueError(f"'{name}' is not one of {POINTS}")
    full, target, count = parse(wanted)
    if name != target:
        return
    _hits[name] += 1
    if _hits[name] != count:
        return
    if full:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
    os.kill(os.getpid(), signal.SIGKILL)


def parse(text: str) -> tuple[bool, str, int]:
    """Reads a fault: whether it is a full disk, the point's name, and the hit that triggers it.

    >>> parse("enospc:commit:start@2")
    (True, 'commit:start', 2)

    Raises:
        ConfigError: unknown point, or no positive count.
    """
    name, _, count = text.removeprefix("enospc:").rpartition("@")
    if name not in POINTS or not count.isdecimal() or int(count) < 1:
        raise ConfigError(f"{VARIABLE}='{text}': write [enospc:]<point>@<n>, n >= 1; points: {', '.join(POINTS)}")
    return text.startswith("enospc:"), name, int(count)
