"""Sizes of a base model, from its config alone: no weights are read, none are allocated."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PretrainedConfig, PreTrainedModel

from fedtailor.core.settings import ModelConfig
from fedtailor.models import tiny_bert
from fedtailor.models.classifier import load_config
from fedtailor.models.families import adapted_linears, embedding_names
from fedtailor.models.source import resolve


@dataclass(frozen=True)
class ModelDimensions:
    """What memory, bytes on the wire and the PSG's size follow from.

    Attributes:
        linears: (full module path, d_in, d_out) of the L adapted linear layers, in module order.
        parameters: all parameters of the classifier, head included; tied weights count once.
        body_parameters: those without the classification head.
        embedding_parameters: those of the embedding tables (words, positions, token types).
    """

    linears: tuple[tuple[str, int, int], ...]
    parameters: int
    body_parameters: int
    embedding_parameters: int

    @property
    def layers(self) -> int:
        """L, the number of adapted linear layers; the budget r stands for r * L ranks."""
        return len(self.linears)

    def adapter_parameters(self, rank: int) -> int:
        """Parameters of A and B together at ``rank`` in every adapted layer."""
        return sum(rank * (d_in + d_out) for _, d_in, d_out in self.linears)


def dimensions(cfg: ModelConfig, num_labels: int = 2, max_length: int = 256) -> ModelDimensions:
    """Measures a model on the meta device.

    ``tiny-bert`` is measured at its largest vocabulary, ``mbert`` from the config that comes with fedtailor,
    anything else from its own config.json.

    Args:
        cfg: the model section.
        num_labels: number of classes of the task.
        max_length: tokens of a text; sets the positions of ``tiny-bert`` only.

    Raises:
        ModelError: no config, no classifier of that type, or a layer in ``cfg.targets`` that does not exist.
    """
    model = meta_model(cfg, num_labels, max_length)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    tables = set(embedding_names(model))
    linears = adapted_linears(model, cfg.targets)
    return ModelDimensions(
        linears=tuple((name, layer.in_features, layer.out_features) for name, layer in linears),
        parameters=sum(sizes.values()),
        body_parameters=sum(parameter.numel() for parameter in model.base_model.parameters()),
        embedding_parameters=sum(size for name, size in sizes.items() if name in tables),
    )


def meta_model(cfg: ModelConfig, num_labels: int = 2, max_length: int = 256) -> PreTrainedModel:
    """The classifier on the meta device: shapes and names without weights. Arguments as `dimensions`.

    Raises:
        ModelError: no config, or no classifier of that type.
    """
    config = _config(cfg, max_length)
    config.id2label = {i: f"LABEL_{i}" for i in range(num_labels)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False
        )
    return model


def mbert_config() -> PretrainedConfig:
    """Dimensions of google-bert/bert-base-multilingual-cased (a copy in the package)."""
    with resources.as_file(resources.files("fedtailor.models") / "mbert_config.json") as path:
        return BertConfig.from_json_file(path)


def _config(cfg: ModelConfig, max_length: int) -> PretrainedConfig:
    source = resolve(cfg)
    if source.kind == "embedded":
        return tiny_bert.bert_config(cfg, max_length, cfg.vocab_size, [])
    if cfg.name == "mbert" and source.kind == "hub":
        return mbert_config()
    return load_config(source.location, source.revision)
