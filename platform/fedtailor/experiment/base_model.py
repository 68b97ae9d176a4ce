"""The trained base model as a Hugging Face folder: what adapters stack on and what `export --base` gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from fedtailor.core.errors import CapabilityError
from fedtailor.core.messages import Row, StageSpec
from fedtailor.federated.method import Method
from fedtailor.models.load import load_base, load_tokenizer, save_folder
from fedtailor.tasks.source import TaskKind


@runtime_checkable
class Mergeable(Protocol):
    """Parameters that can become plain weights."""

    def merge(self, weights: Mapping[str, Tensor], tensors: Mapping[str, Row]) -> None:
        """Writes ``tensors`` into ``weights``, in place and in float32."""


def write_base(
    spec: StageSpec,
    method: Method,
    tensors: Mapping[str, Row],
    labels: Sequence[str],
    out: Path,
    kind: TaskKind = "classification",
) -> None:
    """Writes initial model + SHARED parameters as one model in float32, whatever type the stage kept its base in.

    A bfloat16 model could not hold what a LoRA of a few rounds adds to it.

    Raises:
        CapabilityError: the method's adapter cannot become plain weights.
    """
    if not isinstance(method.adapter, Mergeable):
        raise CapabilityError(f"{method.name}: its parameters cannot be merged into a base model")
    write_merged(Path(spec.model_dir), labels, method.adapter, tensors, out, kind)


def write_merged(
    source: Path,
    labels: Sequence[str],
    part: Mergeable,
    tensors: Mapping[str, Row],
    out: Path,
    kind: TaskKind = "classification",
) -> None:
    """Writes the model in ``source`` with further parameters merged, in float32, as a whole."""
    model = load_base(source, kind, labels)
    with torch.no_grad():
        part.merge(dict(model.named_parameters()), tensors)
    save_folder(model, load_tokenizer(source), out)
