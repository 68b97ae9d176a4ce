"""The worker, which runs segments of a stage wherever it lives: in `SerialPool` here, or in a Ray actor.

What a group of ranks computed is checked before anybody counts it. Saving under ZeRO has a known way to fail in
silence: shards are written where whole tensors were meant, empty ones among them. Here nothing that is trained is ever
sharded on its way out, and the check makes sure of it.
"""

from __future__ import annotations

import ctypes
import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from typing import Any

import numpy as np
from safetensors.torch import load

from fedtailor.adapters.full import plain_name
from fedtailor.core.errors import MethodError, TailorError, WorkerError
from fedtailor.core.faults import FaultPlan, Sabotage, planned
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec
from fedtailor.core.scope import Ranks
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.pool import Meanwhile, OnEvent, OnResult, nothing
from fedtailor.lanes.net import LaneNet
from fedtailor.storage.artifacts import on_this_node
from fedtailor.worker.open_stage import OpenStage
from fedtailor.worker.segment import Segment

WEIGHTS = "adapter_model.safetensors"

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8
"""Numbers of glibc's mallopt(3)."""

LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc takes no larger threshold. Weights of large models stay above it and go back to the system."""

KEPT = 512 * 2**20
"""Free bytes at the end of the heap from which on they are given back."""

MEASURED = ("seconds", "costs", "host", "attempt")
"""Parts of a result that differ between ranks and count for nothing."""


def check_answer(result: SegmentResult, net: LaneNet) -> None:
    """Opens every exported adapter again and looks at every update's length.

    Raises:
        WorkerError: an adapter without tensors, a tensor that is empty, not finite or of another shape than its layer
            asks for, or an update that did not move; names client and tensor.
    """
    for client, norm in result.norms.items():
        if not (np.isfinite(norm) and norm > 0):
            raise WorkerError(f"{result.stage}: the update of client {client} did not move (its length is {norm})")
    shapes = {layer.name: (layer.d_in, layer.d_out) for layer in net.adapted}
    for lane, files in result.adapters.items():
        problem = next(_adapter_problems(files, shapes), None)
        if problem:
            raise WorkerError(f"{result.stage}: the adapter {lane} is refused: {problem}")


def _adapter_problems(files: Mapping[str, bytes], shapes: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    tensors = load(files[WEIGHTS]) if WEIGHTS in files else {}
    if not tensors:
        yield "it has no tensors"
    moved = False
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
        if tensor.numel() == 0:
            yield f"{name} is empty, {tuple(tensor.shape)}"
        if not bool(tensor.isfinite().all()):
            yield f"{name} is not finite"
        axis = 1 if part == "lora_A" else 0
        if module in shapes and (tensor.dim() != 2 or tensor.shape[axis] != shapes[module][1 - axis]):
            yield f"{name} has the shape {tuple(tensor.shape)}, its layer is {shapes[module]}"
        moved |= part == "lora_B" and bool(tensor.any())
    if not moved:
        yield "all its B are 0: it did not move"


def content_hash(result: SegmentResult) -> str:
    """Hash of everything that a result may change in a run; equal on all ranks of a group.

    >>> content_hash(SegmentResult("s", 0, 0, 0)) == content_hash(SegmentResult("s", 0, 0, 1, seconds={"a": 1.0}))
    True
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in fields(result):
        if part.name not in MEASURED:
            for piece in _pieces(getattr(result, part.name)):
                digest.update(struct.pack("<q", len(piece)) + piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    """A value's content as bytes, in a fixed order; mappings keep theirs."""
    if isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape}".encode()
        yield np.ascontiguousarray(value).tobytes()
    elif isinstance(value, bytes):
        yield value
    elif is_dataclass(value) and not isinstance(value, type):
        yield type(value).__name__.encode()
        yield from _pieces({part.name: getattr(value, part.name) for part in fields(value)})
    elif isinstance(value, (Mapping, list, tuple)):
        yield f"{len(value)}".encode()
        for item in value.items() if isinstance(value, Mapping) else value:
            yield from _pieces(item)
    else:
        yield repr(value).encode()


class Worker:
    """Keeps one model resident and plays segment after segment through it.

    Args:
        ranks: the processes that hold the model together and all run the same segments; None: this one alone.
    """

    def __init__(self, ranks: Ranks | None = None) -> None:
        import_module("transformers.modeling_utils")  # every stage needs it; who only waits for workers does not
        self._ranks = ranks
        if ranks is None:  # the weights that ranks gather come and go: theirs go back to the system
            keep_freed_memory()
        self._stage: OpenStage | None = None
        self._base: dict[str, int] = {}
        """Fingerprint of the resident base, as it was loaded."""
        self._verified = False
        self._faults: FaultPlan | None = None

    def open(self, spec: StageSpec) -> StageInfo:
        """Opens a stage; the model stays if the one before used the same, unchanged."""
        spec, old = on_this_node(spec), self._stage
        keep = old and not old.trains_base and same_base(old.spec, spec)
        net = old.net if old and keep else None
        if old and keep:
            self._verify(old)
        self._stage = None
        if net is not None:
            net.unbind()
        self._stage = OpenStage.open(spec, net, self._ranks)
        self._verified = self._stage.trains_base
        if net is None and not self._verified:
            self._base = self._stage.net.fingerprint()
        self._faults = planned()
        return self._stage.info()

    def close(self) -> None:
        """Forgets the model."""
        self._stage = None

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        """Plays one segment.

        Args:
            job: clients and round.
            shared: SHARED state (P,) float32; only read, may be a read-only buffer.

        Returns:
            One sum over the valid clients, and rows, private state and failures of each.

        Raises:
            MethodError: the method breaks a rule of `federated.method`, or changed the frozen base.
            TailorError: nothing in the segment can run (wrong stage, method without a round).
            WorkerError: what ranks computed together is not what it should be; see `worker.worker`.
        """
        stage = self._stage
        if stage is None or stage.spec.key != job.stage:
            raise TailorError(f"segment of stage {job.stage} sent to a worker of {stage.spec.key if stage else 'none'}")
        sabotage = Sabotage(self._faults, job) if self._faults else None
        result = Segment(stage, job, shared, sabotage).play()
        if not self._verified:
            self._verify(stage)
        if self._ranks is not None:
            stage.net.verify()
            check_answer(result, stage.net)
        return result

    def _verify(self, stage: OpenStage) -> None:
        """Once per stage, before anything of it is committed, and once more before the next stage gets the model."""
        check_base(self._base, stage.net.fingerprint(), stage.who)
        self._verified = True


def check_base(before: Mapping[str, int], after: Mapping[str, int], who: str) -> None:
    """Compares two of `LaneNet.fingerprint`.

    Raises:
        MethodError: a weight is not what it was.
    """
    # An overlay that was bound in between puts a wrapper around a layer.
    known = {plain_name(name): value for name, value in before.items()}
    changed = [name for name, value in after.items() if known[plain_name(name)] != value]
    if changed:
        more = f" and {len(changed) - 1} more weights" if len(changed) > 1 else ""
        raise MethodError(
            f"{who} changed the frozen base: {plain_name(changed[0])}{more}; "
            "a client function trains ctx.params, what its adapter and modules declare, and nothing else"
        )


def same_base(old: StageSpec, new: StageSpec) -> bool:
    """Whether a worker may keep the model that it has for another stage."""
    return all(getattr(old, name) == getattr(new, name) for name in ("model_dir", "data_dir", "model", "engine"))


def merge_results(parts: Sequence[SegmentResult]) -> SegmentResult:
    """One result from those of a segment's single clients, in client order."""
    whole = replace(parts[0])
    for part in parts[1:]:
        for name, more in vars(part).items():
            mine = getattr(whole, name)
            if mine is None or more is None:
                setattr(whole, name, more if mine is None else mine)
            elif isinstance(mine, (list, tuple)):
                setattr(whole, name, mine + more)
            elif isinstance(mine, dict) and name != "host":
                setattr(whole, name, mine | more)
            elif name == "partial":
                whole.partial = mine.merged(more)
    return whole


def keep_freed_memory() -> bool:
    """Tells glibc to use freed buffers again instead of giving them back to the system after every step.

    By default large buffers and the end of the heap go back when they are freed, so every step asks for the same pages
    again, which the kernel zeroes first: up to 600,000 a round. Changes no number.

    Returns:
        Whether this C library can be told so; others (musl, macOS) are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena: those of further threads give back whole heaps of 64 MB, whatever the thresholds say.
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, LARGEST_KEPT), (_TRIM_THRESHOLD, KEPT))
    taken = [bool(mallopt(key, value)) for key, value in settings]
    return all(taken)


class SerialPool:
    """Runs everything in this process; for debugging, notebooks and most tests."""

    def __init__(self, config: EngineConfig, on_event: OnEvent) -> None:
        self._worker = Worker()

    @property
    def size(self) -> int:
        """One."""
        return 1

    def open(self, spec: StageSpec) -> StageInfo:
        """See `Pool.open`."""
        return self._worker.open(spec)

    def run(
        self,
        jobs: Sequence[SegmentJob],
        shared: FloatArray | None,
        on_result: OnResult,
        meanwhile: Meanwhile = nothing,
    ) -> list[SegmentResult]:
        """See `Pool.run`."""
        meanwhile()
        results = []
        for job in jobs:
            results.append(self._worker.run(job, shared))
            on_result(results[-1])
        return results

    def close(self) -> None:
        """Forgets the model."""
        self._worker.close()
