"""Loads a sequence classifier and its tokenizer from a Hugging Face folder or hub id, never from pickle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedtailor.core.errors import ModelError
from fedtailor.core.seeding import torch_rng
from fedtailor.models.folder import explained, quiet


def load_classifier(
    source: str | Path,
    num_labels: int,
    label_names: Sequence[str],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    replace_head: bool = False,
) -> PreTrainedModel:
    """Loads a base model with a classification head, in evaluation mode.

    A checkpoint without a head (mBERT as published) gets a fresh one: matrices N(0, ``initializer_range``),
    biases 0, drawn from ``seed`` alone, so that every stage and process starts from the same numbers. The
    global random state is neither read nor changed.

    Args:
        source: folder or hub id; weights must be safetensors.
        num_labels: number of classes C; the head ends in C outputs.
        label_names: C names in the order of their ids, written to the config.
        dtype: type of all weights.
        seed: run seed of a fresh head.
        revision: hub revision.
        attn_implementation: ``eager``, ``sdpa``, ...; default: transformers' choice.
        replace_head: a head for other labels is replaced by a fresh one instead of being refused.

    Raises:
        ModelError: nothing loadable there, the body lacks weights or has other shapes than the config says,
            or the head was made for other labels.
    """
    if len(label_names) != num_labels or num_labels < 1:
        raise ModelError(f"{num_labels} labels need as many names, got {list(label_names)}")
    config = load_config(source, revision)
    stored = [str(name) for _, name in sorted(dict(config.id2label or {}).items())]
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    model, info = read_weights(
        AutoModelForSequenceClassification, source, config, dtype, revision=revision, attention=attn_implementation
    )
    missing = set(info["missing_keys"])
    mismatched = {key for key, *_ in info["mismatched_keys"]}
    _check_body(model, source, missing | mismatched)
    if missing | mismatched or not _same_labels(stored, label_names):
        had_head = any(name not in missing for name in _head_names(model))
        if had_head and not replace_head:
            raise ModelError(
                f"{source}: the classification head was made for the labels {stored}, the task has {list(label_names)}"
            )
        fresh = set(_head_names(model)) | missing
        _initialise(model, fresh, float(getattr(config, "initializer_range", 0.02)), seed)
    return model.eval()  # type: ignore[no-any-return]


def read_weights(
    auto: Any,
    source: str | Path,
    config: PretrainedConfig,
    dtype: torch.dtype,
    *,
    revision: str | None = None,
    attention: str | None = None,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    """Reads a model from safetensors; what is missing or misshapen is for the caller to judge.

    Args:
        auto: transformers' class for the kind of model.
        source: folder or hub id.
        config: of the model.
        dtype: type of all weights.
        revision: hub revision.
        attention: ``eager``, ``sdpa``, ...; default: transformers' choice.
        options: further arguments of ``from_pretrained``.

    Returns:
        The model and transformers' loading info (``missing_keys``, ``mismatched_keys``).

    Raises:
        ModelError: nothing loadable there.
    """
    if attention:
        options["attn_implementation"] = attention
    # transformers draws missing weights from the global generator, which is not ours to move.
    with explained(source, "model weights"), quiet(), torch.random.fork_rng(devices=[]):
        found: tuple[Any, dict[str, Any]] = auto.from_pretrained(
            str(source),
            config=config,
            revision=revision or "main",
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return found


def load_tokenizer(source: str | Path, *, revision: str | None = None, padded: bool = True) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that can pad, unless ``padded`` is False: then it may lack a padding token.

    Raises:
        ModelError: there is none, or it has no padding token.
    """
    with explained(source, "a tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(source), revision=revision or "main", trust_remote_code=False)
    if padded and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{source}: its tokenizer has no padding token, which batches need; set 'pad_token' in its "
            f"tokenizer_config.json (for example to the unknown or end-of-text token)"
        )
    return tokenizer


def load_config(source: str | Path, revision: str | None = None) -> PretrainedConfig:
    """Loads ``config.json`` of a folder or hub id.

    Raises:
        ModelError: it is missing, unreadable, or of an architecture that transformers does not know.
    """
    with explained(source, "a model config"), quiet():
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(source), revision=revision or "main", trust_remote_code=False
        )
    return config


def _head_names(model: PreTrainedModel) -> list[str]:
    body = model.base_model_prefix + "."
    return [name for name, _ in model.named_parameters() if not name.startswith(body)]


def _check_body(model: PreTrainedModel, source: str | Path, absent: set[str]) -> None:
    # A masked-language-model checkpoint has no pooler; it is then as new as the classifier.
    body, pooler = model.base_model_prefix + ".", model.base_model_prefix + ".pooler."
    lost = sorted(name for name in absent if name.startswith(body) and not name.startswith(pooler))
    if lost:
        raise ModelError(
            f"{source}: {len(lost)} weights of {type(model).__name__} are missing or have another shape than "
            f"config.json says, e.g. {', '.join(lost[:3])}"
        )


def _same_labels(stored: Sequence[str], wanted: Sequence[str]) -> bool:
    unnamed = list(stored) == [f"LABEL_{i}" for i in range(len(stored))]
    return len(stored) == len(wanted) and (unnamed or list(stored) == list(wanted))


def _initialise(model: nn.Module, names: set[str], spread: float, seed: int) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names and weight.dim() > 1:
                drawn = torch.empty(weight.shape).normal_(0.0, spread, generator=torch_rng(seed, "model", "head", name))
                weight.copy_(drawn)
            elif name in names and name.endswith("bias"):
                weight.zero_()
