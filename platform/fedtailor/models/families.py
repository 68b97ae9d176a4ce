"""Which linear layers of an architecture carry adapters, in the one order that everything else relies on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtailor.core.errors import ModelError

_SAME_ROLE = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""What BERT calls a layer -> what LLaMA calls it: papers write "query and value" for both."""

Targets = Literal["all-linear"] | tuple[str, ...]


def adapted_linears(model: nn.Module, targets: Targets = "all-linear") -> list[tuple[str, nn.Linear]]:
    """Lists the linear layers that carry adapters, in the order of ``model.named_modules()``.

    ``all-linear`` is every ``nn.Linear`` but the output embedding (``get_output_embeddings()``), as peft
    resolves it when no task type is set, which is how FedP2EFT's reference code runs: an mBERT classifier
    has L = 12 * 6 + pooler + classifier = 74, a LLaMA block 7 (no ``lm_head``).

    Args:
        model: the base model, without adapters; may live on the meta device.
        targets: ``all-linear``, or names that end a module path at a dot: ``query`` matches
            ``bert.encoder.layer.0.attention.self.query``, ``output.dense`` also ``attention.output.dense``; see
            `ends` for names that families share.

    Returns:
        (full module path, layer) pairs; each name is unique.

    Raises:
        ModelError: a target matches no linear layer (the message lists the endings that exist), the model
            has none, or a chosen layer is a transformers ``Conv1D`` (GPT-2), whose weight is transposed.
    """
    candidates = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.Linear | Conv1D)]
    if targets == "all-linear":
        output = _output_embedding(model)
        chosen = [(name, layer) for name, layer in candidates if layer is not output]
    else:
        names = [name for name, _ in candidates]
        unknown = [t for t in targets if not any(ends(name, t) for name in names)]
        if unknown or not targets:
            raise ModelError(
                f"'model.targets' {list(targets)}: no linear layer ends in {unknown or 'any of them'}; "
                f"this model has {endings(names)}"
            )
        chosen = [(name, layer) for name, layer in candidates if any(ends(name, t) for t in targets)]
    if not chosen:
        raise ModelError(f"{type(model).__name__} has no linear layer that could carry an adapter")
    convolutions = [name for name, layer in chosen if isinstance(layer, Conv1D)]
    if convolutions:
        raise ModelError(
            f"{type(model).__name__}: {len(convolutions)} of {len(chosen)} adapted layers are transformers "
            f"Conv1D (first: {convolutions[0]}), which adapters do not support; choose a model built of "
            f"nn.Linear, or name only its nn.Linear layers in 'model.targets'"
        )
    return [(name, layer) for name, layer in chosen if isinstance(layer, nn.Linear)]


def endings(names: Sequence[str]) -> str:
    """Says which last parts module paths have, and how often: ``dense (25), key (12), query (12)``."""
    counts = Counter(name.rsplit(".", 1)[-1] for name in names)
    return ", ".join(f"{ending} ({count})" for ending, count in sorted(counts.items())) or "none"


def embedding_names(model: nn.Module) -> list[str]:
    """Full names of all embedding tables' parameters (word, position, token type), in module order."""
    return [f"{name}.weight" for name, layer in model.named_modules() if isinstance(layer, nn.Embedding)]


def ends(name: str, target: str) -> bool:
    """Whether a target means this module path.

    >>> ends("model.layers.0.self_attn.q_proj", "query"), ends("model.layers.0.mlp.up_proj", "proj")
    (True, False)
    """
    return any(f".{name}".endswith(f".{t}") for t in (target, _SAME_ROLE.get(target, target)))


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    found = getter() if callable(getter) else None
    return found if isinstance(found, nn.Module) else None
