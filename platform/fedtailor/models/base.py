"""A base model from its folder, whatever kind of task it is for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from fedtailor.models.causal import Quantisation, load_causal
from fedtailor.models.classifier import load_classifier
from fedtailor.tasks.source import TaskKind


def load_base(
    folder: str | Path,
    kind: TaskKind,
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: str | None = None,
    quantisation: Quantisation | None = None,
) -> PreTrainedModel:
    """Loads the model of a task's kind, in evaluation mode.

    Args:
        folder: as `hub.materialise` or a base stage wrote it.
        kind: ``classification`` (`load_classifier`) or ``generation`` (`load_causal`).
        labels: class names in the order of their ids; without meaning for generation.
        dtype: type of the weights.
        attn_implementation: ``eager``, ``sdpa``, ...; default: transformers' choice.
        quantisation: of a language model only.

    Raises:
        ModelError: see `load_classifier` and `load_causal`.
    """
    if kind == "generation":
        return load_causal(folder, dtype, attn_implementation=attn_implementation, quantisation=quantisation)
    return load_classifier(folder, len(labels), labels, dtype, attn_implementation=attn_implementation)
