"""Loads a causal language model from a Hugging Face folder or hub id, never from pickle."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from fedtailor.core.errors import ModelError
from fedtailor.models.classifier import load_config, read_weights
from fedtailor.models.scores import check_kind

Quantisation = Literal["8bit", "4bit"]


def load_causal(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantisation: Quantisation | None = None,
) -> PreTrainedModel:
    """Loads a causal language model, in evaluation mode; each weight goes into ``dtype`` as it is read.

    Args:
        source: folder or hub id; weights must be safetensors, in any type.
        dtype: type of the weights; with ``quantisation`` of those that are not quantised.
        revision: hub revision.
        attn_implementation: ``eager``, ``sdpa``, ...; default: transformers' choice.
        quantisation: keep linear layers but the output embedding in 8 bits (Dettmers et al., 2022) or in 4-bit
            NormalFloat (Dettmers et al., 2023) on the current GPU; needs bitsandbytes.

    Raises:
        ModelError: nothing loadable there, not a causal language model, one whose scores are not its output embedding
            of the last hidden state, or weights that are missing or have other shapes than config.json says.
    """
    config = load_config(source, revision)
    check_kind(config, "generation", str(source))
    options = {"quantization_config": _bits(quantisation, dtype)} if quantisation else {}
    model, info = read_weights(
        AutoModelForCausalLM, source, config, dtype, revision=revision, attention=attn_implementation, **options
    )
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        raise ModelError(
            f"{source}: {len(absent)} weights of {type(model).__name__} are missing or have another shape than "
            f"config.json says, e.g. {', '.join(absent[:3])}"
        )
    result: PreTrainedModel = model.eval()
    return result


def _bits(quantisation: Quantisation, dtype: torch.dtype) -> BitsAndBytesConfig:
    # It would say at every layer and step that it rounds what it is given to float16 first.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    if quantisation == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)  # type: ignore[no-untyped-call]
    return BitsAndBytesConfig(  # type: ignore[no-untyped-call]
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
    )
