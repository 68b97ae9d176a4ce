"""Named points of the commit protocol at which a fault plan stops the process or fails the storage.

The plan is read by `core.faults`; without one, `point` costs one look-up in the environment.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter

from fedtailor.core.faults import COMMIT_POINTS, VARIABLE, planned

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
