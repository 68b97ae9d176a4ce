"""What a group of ranks computed, looked at once more before anybody counts it.

Saving under ZeRO has a known way to fail in silence: shards are written where whole tensors were meant, empty ones
among them. Here nothing that is trained is ever sharded on its way out, and this is what makes sure of it.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from safetensors.torch import load

from fedtailor.core.errors import WorkerError
from fedtailor.core.messages import SegmentResult
from fedtailor.core.net import LaneNet

WEIGHTS = "adapter_model.safetensors"
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
    sites = {site.name: (site.d_in, site.d_out) for site in net.sites}
    for lane, files in result.adapters.items():
        problem = next(_adapter_problems(files, sites), None)
        if problem:
            raise WorkerError(f"{result.stage}: the adapter {lane} is refused: {problem}")


def _adapter_problems(files: Mapping[str, bytes], sites: Mapping[str, tuple[int, int]]) -> Iterator[str]:
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
        if module in sites and (tensor.dim() != 2 or tensor.shape[axis] != sites[module][1 - axis]):
            yield f"{name} has the shape {tuple(tensor.shape)}, its layer is {sites[module]}"
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
        for part in fields(value):
            yield from _pieces(getattr(value, part.name))
    elif isinstance(value, Mapping):
        yield f"{len(value)}".encode()
        for key, item in value.items():
            yield from (repr(key).encode(), *_pieces(item))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield repr(value).encode()
