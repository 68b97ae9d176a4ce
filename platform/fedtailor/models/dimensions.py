"""Sizes of a base model, from its config alone: no weights are read, none are allocated."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from fedtailor.core.settings import ModelConfig
from fedtailor.lanes.layers import AdaptedLayer
from fedtailor.models.embedded import embedded_config
from fedtailor.models.families import adapted_linears, check_kind, embedding_names, meta_causal, untrained
from fedtailor.models.load import SPAN_ENDS, load_config, name_labels
from fedtailor.models.source import resolve
from fedtailor.tasks.source import TaskKind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGED = {
    "mbert": "mbert_config.json",
    "mobilellama-1.4b": "mobilellama_1_4b_config.json",
    "llama-3.2-3b": "llama_3_2_3b_config.json",
    "alpaca-7b": "alpaca_7b_config.json",
    "roberta-base": "roberta_base_config.json",
    "roberta-large": "roberta_large_config.json",
    "gpt2-medium": "gpt2_medium_config.json",
    "gpt2-xl": "gpt2_xl_config.json",
    "deberta-v3-base": "deberta_v3_base_config.json",
}
"""Presets whose config.json comes with the package, as published, but for what their sizes do not depend on."""


@dataclass(frozen=True)
class ModelDimensions:
    """What memory, bytes on the wire and the PSG's size follow from.

    Attributes:
        linears: (full module path, d_in, d_out) of the L adapted linear layers, in module order.
        all_linears: of all that could be adapted, whatever ``model.targets`` says.
        parameters: all parameters, head or output embedding included; tied weights count once.
        body_parameters: those without classification head or (unless it is tied) output embedding.
        embedding_parameters: those of the embedding tables (words, positions, token types).
    """

    linears: tuple[tuple[str, int, int], ...]
    all_linears: tuple[tuple[str, int, int], ...]
    parameters: int
    body_parameters: int
    embedding_parameters: int

    @property
    def layers(self) -> int:
        """L, the number of adapted linear layers; the budget r stands for r * L ranks."""
        return len(self.linears)

    def matrices(self, generation: bool) -> int:
        """Weights of linear layers: no embedding tables, but the output embedding of a language model."""
        return self.body_parameters - (0 if generation else self.embedding_parameters)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of A and B together at ``rank`` in every adapted layer."""
        return sum(rank * (d_in + d_out) for _, d_in, d_out in self.linears)


def dimensions(
    cfg: ModelConfig, num_labels: int = 2, max_length: int = 256, kind: TaskKind = "classification"
) -> ModelDimensions:
    """Measures a model on the meta device.

    ``tiny-bert`` and ``tiny-llama`` are measured at their largest vocabulary, the papers' models from the configs that
    come with fedtailor, anything else from its own config.json.

    Args:
        cfg: the model section.
        num_labels: number of classes of the task.
        max_length: tokens of a text; sets the positions of ``tiny-bert`` only.
        kind: of the task; for generation the number of classes has no meaning.

    Raises:
        ModelError: no config, no model of that type for the task, or a layer in ``cfg.targets`` that does not exist.
    """
    model = meta_model(cfg, num_labels, max_length, kind)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tables = set(embedding_names(model))
    linears, every = (
        tuple((layer.name, layer.d_in, layer.d_out) for layer in (AdaptedLayer.of(*pair) for pair in pairs))
        for pairs in (adapted_linears(model, cfg.targets), adapted_linears(model, "all-linear"))
    )
    return ModelDimensions(
        linears=linears,
        all_linears=every,
        parameters=sum(sizes.values()),
        body_parameters=sum(parameter.numel() for parameter in model.base_model.parameters()),
        embedding_parameters=sum(size for name, size in sizes.items() if name in tables),
    )


def meta_model(
    cfg: ModelConfig, num_labels: int = 2, max_length: int = 256, kind: TaskKind = "classification"
) -> PreTrainedModel:
    """The model on the meta device: shapes and names without weights. Arguments as `dimensions`.

    Raises:
        ModelError: no config, or no model of that type for the task.
    """
    config = model_config(cfg, max_length)
    check_kind(config, kind, f"model={cfg.name}")
    if kind == "generation":
        return meta_causal(config)
    name_labels(config, SPAN_ENDS if kind == "extraction" else [f"LABEL_{i}" for i in range(num_labels)])
    with torch.device("meta"):
        return untrained(config, kind)


def packaged_config(name: str) -> PretrainedConfig | None:
    """Dimensions of a preset, from the copy in the package; None: there is none."""
    if name not in _PACKAGED:
        return None
    with resources.as_file(resources.files("fedtailor.models") / _PACKAGED[name]) as path:
        return load_config(path)


def model_config(cfg: ModelConfig, max_length: int) -> PretrainedConfig:
    """The config that a model section stands for. Arguments as `dimensions`.

    Raises:
        ModelError: it is not to be had.
    """
    source = resolve(cfg)
    if source.kind == "embedded":
        return embedded_config(cfg, max_length, cfg.vocab_size)
    known = packaged_config(cfg.name) if source.kind == "hub" else None
    return known or load_config(source.location, source.revision)
