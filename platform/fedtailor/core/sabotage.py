"""What a worker does when a fault plan says so; only tests ever come here."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any

import numpy as np
import psutil  # type: ignore[import-untyped,unused-ignore]
from torch import nn

from fedtailor.core.faults import PROCESS, REPLY, UPDATE, FaultPlan, WorkerFault
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult

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
