"""A frozen base that is spread over the ranks of a group: DeepSpeed ZeRO stage 3.

Paper: Rajbhandari, Rasley, Ruwase, He, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
section 5.3 (parameter partitioning). Every rank keeps 1/N of each weight; a layer's weights are gathered before its
forward and its backward pass and dropped after it. What is trained lives outside, whole on every rank.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from fedtailor.core.errors import ModelError, WorkerError
from fedtailor.models.families import untrained
from fedtailor.models.folder import weight_map
from fedtailor.models.load import SPAN_ENDS, load_config, name_labels
from fedtailor.tasks.source import TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PERSISTENT = 10_000
"""Weights of so few numbers (norms, biases) are gathered once and kept whole."""

ZERO3: Mapping[str, Any] = {
    "stage": 3,
    "overlap_comm": True,
    # Numbers: what a rank may hold of the base beyond its own part.
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 50_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_param_persistence_threshold": PERSISTENT,
}
"""DeepSpeed's ``zero_optimization`` section; `cluster/zero3.json` is the same for scripts of one's own."""


def deepspeed_config(dtype: torch.dtype, ranks: int, offload: bool) -> dict[str, Any]:
    """What DeepSpeed is told; batches and optimizers are not its business here.

    Args:
        dtype: of the base, float32 or bfloat16.
        ranks: processes of the group.
        offload: each rank keeps its part in host memory.
    """
    zero = dict(ZERO3) | ({"offload_param": {"device": "cpu", "pin_memory": True}} if offload else {})
    return {
        "train_micro_batch_size_per_gpu": 1,
        "train_batch_size": ranks,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "zero_optimization": zero,
    }


@dataclass(frozen=True)
class Probe:
    """A weight that is gathered to see whether gathering works, and what it must be."""

    parameter: nn.Parameter
    total: float

    def check(self) -> None:
        """Gathers the weight and compares it with the file it came from.

        Raises:
            WorkerError: the gathered weight is empty or another one.
        """
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([self.parameter]):
            found, shape = _fingerprint(self.parameter.data), tuple(self.parameter.shape)
        expected = tuple(self.parameter.ds_shape)  # type: ignore[attr-defined]
        if shape != expected or found != self.total:
            raise WorkerError(
                f"ZeRO gathered a weight of shape {shape} with checksum {found!r}, its file has {expected} with "
                f"{self.total!r}: the base is not what it should be, so that nothing computed with it is kept"
            )


def load_partitioned(
    folder: Path,
    kind: TaskKind,
    labels: Sequence[str],
    dtype: torch.dtype,
    ranks: int,
    *,
    offload: bool = False,
    attention: str | None = None,
    device: str = "cpu",
) -> tuple[PreTrainedModel, Probe]:
    """Builds a model under ``deepspeed.zero.Init`` and fills it from safetensors, each rank its own part.

    No rank holds more than one whole weight at a time: a module's weights are cut up as soon as it is made, and of the
    files a rank reads only the rows that its part overlaps. All ranks of the group call this together, after
    `actors.zero_rank.ZeroRank.join`.

    Args:
        folder: model folder, complete, with one safetensors file or several and their index.
        kind: of the task.
        labels: class names of a classifier.
        dtype: of the base.
        ranks: processes of the group.
        offload: keep each part in host memory.
        attention: kernel; None: transformers' choice.
        device: ``cpu`` or ``cuda``.

    Returns:
        The frozen model, its hooks set, and a `Probe`.

    Raises:
        ModelError: a weight is missing or has another shape than the config says.
    """
    deepspeed = _deepspeed(device)
    config = load_config(folder)
    settings = deepspeed_config(dtype, ranks, offload)
    if kind != "generation":
        name_labels(config, SPAN_ENDS if kind == "extraction" else labels)
    options = {"attn_implementation": attention} if attention else {}
    # Types are left to transformers: rotary tables stay float32 in a bfloat16 model.
    with no_init_weights(), deepspeed.zero.Init(config_dict_or_path=settings, tensor_overrides=set()):
        model = untrained(config, kind, dtype=dtype, **options)
    model.tie_weights()
    probe = _fill(model, folder)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    model.requires_grad_(False)
    model.eval()  # type: ignore[no-untyped-call]
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    if kind == "generation":
        _start_at_body(model, engine.optimizer)
    return model, probe


def base_bytes(model: nn.Module) -> int:
    """Bytes of the base that this process keeps: its parts of partitioned weights, and whole ones elsewhere.

    What a pass has gathered comes on top: at most ``stage3_max_live_parameters`` numbers and one layer.
    """
    kept = [getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters()]
    return sum(tensor.numel() * tensor.element_size() for tensor in kept)


def _deepspeed(device: str) -> Any:
    """DeepSpeed, told which device it is on and to compile nothing."""
    os.environ.setdefault("DS_ACCELERATOR", device)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    # Else it builds a C++ operator for shared-memory collectives at first use.
    deepspeed.ops.__compatible_ops__ = {}
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)
    return deepspeed


def _start_at_body(model: PreTrainedModel, offload: Any) -> None:
    """A pass begins at the body: targets are scored at some positions only, without calling the model itself.

    DeepSpeed orders what it fetches ahead by passes, and frees what a pass has left behind.
    """
    called = list[bool]()

    def begin(*_: object) -> None:
        if not called:
            offload.release_backward_leftovers()
            offload.get_param_coordinator().reset_step()

    model.base_model.register_forward_pre_hook(begin, prepend=True)
    # Where the model is called after all, DeepSpeed has begun the pass there.
    model.register_forward_pre_hook(lambda *_: called.append(True), prepend=True)
    model.register_forward_hook(lambda *_: called.clear(), always_call=True)


def _fill(model: PreTrainedModel, folder: Path) -> Probe:
    """Copies every weight's own part from the files; returns a probe on the smallest weight that is cut up."""
    wanted: dict[str, Any] = dict(model.named_parameters())  # tied weights once, under their first name
    probed = min(wanted, key=lambda name: (wanted[name].ds_numel <= PERSISTENT, wanted[name].ds_numel))
    total, parameter = 0.0, wanted[probed]
    shards = weight_map(folder)
    for shard in sorted(set(shards.values())):
        file = folder / shard
        if not file.is_file():
            raise ModelError(f"{folder}: the shard {shard} that its index names is missing")
        with safe_open(file, framework="pt") as tensors:
            for name in [name for name in wanted if shards.get(name) == shard]:
                _copy_part(wanted.pop(name), tensors.get_slice(name), f"{file}: '{name}'")
                if name == probed:
                    total = _fingerprint(tensors.get_tensor(name).to(parameter.ds_tensor.dtype))
    if wanted:
        raise ModelError(f"{folder}: {len(wanted)} weights are missing, e.g. {', '.join(sorted(wanted)[:3])}")
    return Probe(parameter, total)


def _copy_part(parameter: Any, piece: Any, where: str) -> None:
    """Fills this rank's part: a run of ceil(n / N) numbers of the flattened weight, the last one padded."""
    shape, expected = tuple(piece.get_shape()), tuple(parameter.ds_shape)
    if shape != expected:
        raise ModelError(f"{where} has the shape {shape}, config.json says {expected}")
    part, total = parameter.ds_tensor, math.prod(shape)
    start = parameter.ds_zero_partition_rank * part.ds_numel
    stop = min(start + part.ds_numel, total)
    if start >= stop:
        return
    width = math.prod(shape[1:])
    low, high = start // width, -(-stop // width)
    flat = piece[low:high].reshape(-1)[start - low * width : stop - low * width]
    part.data[: stop - start].copy_(flat)


def _fingerprint(weight: Tensor) -> float:
    """Sums of a weight in float64, position-dependent: equal weights have equal ones."""
    wide = weight.detach().flatten().double().cpu()
    return float((wide * (torch.arange(len(wide)) % 97 + 1)).sum())
