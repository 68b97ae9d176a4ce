"""The frozen model of a stage, resident on a worker: in one process, or on the ranks of a group together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from fedtailor.core.messages import StageSpec
from fedtailor.core.scope import Ranks
from fedtailor.lanes.net import LaneNet
from fedtailor.models.families import adapted_linears
from fedtailor.models.load import load_base
from fedtailor.models.zero import load_partitioned
from fedtailor.tasks.source import TaskKind
from fedtailor.tasks.tokens import TokenData

_BASE_IS_PARTITIONED = 3
"""Stage of ZeRO."""


def load_net(
    folder: Path,
    targets: Literal["all-linear"] | tuple[str, ...],
    labels: Sequence[str],
    kind: TaskKind = "classification",
    *,
    device: str = "cpu",
    dtype: str = "float32",
    weights: Literal["float32", "bfloat16", "8bit", "4bit"] = "float32",
    attention: str | None = None,
    base_dropout: float = 0.0,
    checkpointing: bool = False,
) -> LaneNet:
    """A frozen model with its adapted layers wrapped.

    Args:
        folder: Hugging Face folder of the model.
        targets: linear layers to adapt.
        labels: class names in the order of their ids; unused for generation.
        kind: what the model's head is for.
        device: where to compute.
        dtype: what is computed in.
        weights: how the base is kept: ``float32``, ``bfloat16``, ``8bit`` or ``4bit``.
        attention: implementation of transformers; None: its choice.
        base_dropout: dropout of the base's own layers while training.
        checkpointing: whether blocks are computed again in the backward pass.

    Raises:
        ModelError: the folder cannot be loaded.
    """
    bits = weights if weights in ("8bit", "4bit") else None
    kept = torch.float32 if weights == "float32" else torch.bfloat16
    model = load_base(folder, kind, labels, kept, attn_implementation=attention, quantisation=bits)
    if bits is None:  # quantised weights are made on the GPU and stay there
        model.to(torch.device(device))  # type: ignore[arg-type]
    return LaneNet(model, adapted_linears(model, targets), dtype, base_dropout, checkpointing=checkpointing)


def load_net_of(spec: StageSpec, labels: Sequence[str], kind: TaskKind) -> LaneNet:
    """The frozen model of a stage in one process."""
    return load_net(
        Path(spec.model_dir), spec.targets, labels, kind, device=spec.device, dtype=spec.dtype, weights=spec.weights,
        attention=spec.attention, base_dropout=spec.base_dropout, checkpointing=spec.checkpointing,
    )  # fmt: skip


def load_together(spec: StageSpec, data: TokenData, ranks: Ranks) -> LaneNet:
    """The frozen model of a stage on the ranks of a group: spread over them, or (ZeRO stage 1) whole on each."""
    if spec.zero["stage"] != _BASE_IS_PARTITIONED:
        net = load_net_of(spec, data.labels, data.kind)
        net.ranks, net.shares_optimizer = ranks, True
        return net
    model, probe = load_partitioned(
        Path(spec.model_dir),
        None if data.kind == "generation" else data.labels,
        torch.bfloat16 if spec.weights == "bfloat16" else torch.float32,
        ranks.size,
        offload=bool(spec.zero.get("offload")),
        attention=spec.attention,
        device=spec.device,
    )
    probe.check()
    linears = adapted_linears(model, spec.targets)
    return LaneNet(model, linears, spec.dtype, spec.base_dropout, spec.checkpointing, ranks, probe.check)
