"""Are a language model's scores exactly its output embedding of the last hidden state? Found out without weights."""

from __future__ import annotations

import json
from functools import lru_cache

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fedtailor.core.errors import ModelError
from fedtailor.tasks.source import TaskKind

CAUSAL_MODELS = "tiny-llama, mobilellama-1.4b, llama-3.2-3b, or any causal language model that ends in a linear layer"
CLASSIFIERS = "tiny-bert, mini-mbert, mbert, roberta-base, roberta-large, or any sequence classifier"


def check_kind(config: PretrainedConfig, kind: TaskKind, where: str) -> None:
    """Checks that transformers makes a model of the task's kind from a config.

    Args:
        config: of the base model.
        kind: of the task.
        where: name of the model for the message.

    Raises:
        ModelError: it does not, or the model's scores are not a linear layer's output (see `check_scores`).
    """
    name = config.model_type
    if kind == "classification":
        if type(config) not in AutoModelForSequenceClassification._model_mapping:
            raise ModelError(
                f"{where}: transformers has no sequence classifier of type '{name}' (allowed for classification: "
                f"{CLASSIFIERS})"
            )
        return
    # An encoder may be in the list of causal models, as a decoder that nobody has trained.
    causal = type(config) in AutoModelForCausalLM._model_mapping
    if not causal or type(config) in AutoModelForMaskedLM._model_mapping or config.is_encoder_decoder:
        raise ModelError(
            f"{where}: type '{name}' is no causal language model, which generation needs (allowed: {CAUSAL_MODELS})"
        )
    check_scores(config, where)


def check_scores(config: PretrainedConfig, where: str) -> None:
    """Checks that the scores are ``get_output_embeddings()(hidden)`` and nothing else.

    Only the tokens that are learned get scores, past the model's own last lines (`core.net.LaneNet.logits`): what these
    do there, e.g. Gemma 2's soft cap or Cohere's scale, would silently be lost.

    Raises:
        ModelError: they are not, or it cannot be told; names the type.
    """
    reason = _why_not(config.to_json_string(use_diff=False), config.model_type)
    if reason:
        raise ModelError(f"{where}: models of type '{config.model_type}' are not supported for generation: {reason}")


def meta_causal(config: PretrainedConfig) -> PreTrainedModel:
    """A causal language model on the meta device: names and shapes without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, trust_remote_code=False, dtype=torch.float32
        )
    return model


@lru_cache(maxsize=8)
def _why_not(config: str, model_type: str) -> str:
    """Empty where the scores are plain."""
    model = meta_causal(CONFIG_MAPPING[model_type].from_dict(json.loads(config)))
    output: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(output, nn.Linear):
        return f"they end in {type(output).__name__}, not in a linear layer"
    made: list[Tensor] = []
    output.register_forward_hook(lambda _module, _inputs, result: made.append(result))
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    # Masks and positions that are given spare most models a look at values, which the meta device has not.
    given = {"position_ids": ids, "attention_mask": torch.zeros(1, 1, 2, 2, device="meta")}
    told = ""
    for inputs in (given, {}):
        made.clear()
        try:
            with torch.no_grad():
                scores = model(input_ids=ids, use_cache=False, **inputs).logits
        except Exception as error:  # any model's code may fail here in its own way
            told = told or f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            continue
        # The very tensor that the layer made: nothing was done to it.
        plain = len(made) == 1 and scores is made[0]
        return "" if plain else "they change the output embedding's scores (a scale or a soft cap)"
    return f"their scores cannot be followed without weights ({told})"
