"""Tiny random models of many architectures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from fedtailor.tasks.source import TaskKind

WIDTH, PAD = 16, 0
SPARE = 8
"""Embeddings that no token has: some tokenizers bring tokens of their own."""
BOTH: tuple[TaskKind, ...] = ("classification", "generation")
CLASSIFIES: tuple[TaskKind, ...] = ("classification",)


@dataclass(frozen=True)
class Architecture:
    name: str
    type: str
    kinds: tuple[TaskKind, ...]
    sizes: Mapping[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    """Sizes that its config calls otherwise."""

    def config(self, vocabulary: int, end: int) -> PretrainedConfig:
        """For a tokenizer of so many tokens, whose texts end in ``end``."""
        common = {
            "vocab_size": vocabulary + SPARE, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 24, "max_position_embeddings": 160, "pad_token_id": PAD, "bos_token_id": 1,
            "eos_token_id": end,
        }  # fmt: skip
        return AutoConfig.for_model(
            self.type, **{k: v for k, v in common.items() if k not in self.without}, **self.sizes
        )


BLOCK = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "max_position_embeddings")
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0}
GROUPED = {"num_key_value_heads": 1, "head_dim": 8}
SEVERAL_PARTS = {
    "text_config": {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, **GROUPED},
    "vision_config": {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
                      "image_size": 28, "patch_size": 14},
    "mm_tokens_per_image": 4,
}  # fmt: skip
ARCHITECTURES = (
    Architecture("BERT", "bert", CLASSIFIES),
    Architecture("DistilBERT", "distilbert", CLASSIFIES, {"dim": WIDTH, "n_layers": 2, "n_heads": 2, "hidden_dim": 24}),
    Architecture("ALBERT", "albert", CLASSIFIES, {"embedding_size": 8}),
    Architecture("ELECTRA", "electra", CLASSIFIES, {"embedding_size": 8}),
    Architecture("RoBERTa", "roberta", CLASSIFIES),
    Architecture("XLM-R", "xlm-roberta", CLASSIFIES),
    Architecture("DeBERTa", "deberta", CLASSIFIES, RELATIVE),
    Architecture(
        "DeBERTa-v2, v3",
        "deberta-v2",
        CLASSIFIES,
        {
            **RELATIVE,
            "share_att_key": True,
            "position_buckets": 16,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    Architecture(
        "ModernBERT",
        "modernbert",
        CLASSIFIES,
        {
            "global_attn_every_n_layers": 2,
            "local_attention": 8,
            "cls_token_id": 2,
            "sep_token_id": 3,
        },
    ),
    Architecture("Longformer", "longformer", CLASSIFIES, {"attention_window": 8}),
    Architecture(
        "Funnel",
        "funnel",
        CLASSIFIES,
        {
            "block_sizes": [1, 1],
            "d_model": WIDTH,
            "n_head": 2,
            "d_head": 8,
            "d_inner": 24,
        },
        without=BLOCK,
    ),
    Architecture(
        "BART",
        "bart",
        CLASSIFIES,
        {
            "d_model": WIDTH,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
        },
        without=BLOCK[:-1],
    ),
    Architecture(
        "T5",
        "t5",
        BOTH,
        {
            "d_model": WIDTH,
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_heads": 2,
            "d_kv": 8,
            "d_ff": 24,
            "decoder_start_token_id": PAD,
        },
        without=BLOCK,
    ),
    Architecture("XLNet", "xlnet", BOTH, {"d_model": WIDTH, "n_layer": 2, "n_head": 2, "d_inner": 24}, without=BLOCK),
    Architecture("Llama", "llama", BOTH, GROUPED),
    Architecture("Qwen 2", "qwen2", BOTH, {"num_key_value_heads": 1}),
    Architecture("Qwen 3", "qwen3", BOTH, GROUPED),
    Architecture("Mistral", "mistral", BOTH, GROUPED),
    Architecture("Phi", "phi", BOTH),
    Architecture("Gemma", "gemma", BOTH, GROUPED),
    Architecture("Gemma 2", "gemma2", BOTH, GROUPED),
    Architecture("Gemma 2, scores not capped", "gemma2", ("generation",), {**GROUPED, "final_logit_softcapping": None}),
    Architecture("Gemma 3, text alone", "gemma3_text", BOTH, GROUPED),
    Architecture("Gemma 3, several parts", "gemma3", BOTH, SEVERAL_PARTS, without=("vocab_size", *BLOCK)),
    Architecture(
        "GPT-2", "gpt2", BOTH, {"n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 160}, without=BLOCK
    ),
    Architecture("GPT-NeoX", "gpt_neox", BOTH),
    Architecture("OPT", "opt", BOTH, {"ffn_dim": 24, "word_embed_proj_dim": 8}),
    Architecture("BLOOM", "bloom", BOTH, {"n_layer": 2, "n_head": 2}),
    Architecture("Falcon", "falcon", BOTH),
    Architecture("Mixtral", "mixtral", BOTH, {**GROUPED, "num_local_experts": 4}),
)
HEADS: Mapping[TaskKind, str] = {"classification": "class", "generation": "text"}
CELLS = [(architecture, kind) for architecture in ARCHITECTURES for kind in architecture.kinds]


def title(architecture: Architecture, kind: TaskKind) -> str:
    return f"{architecture.name}: {HEADS[kind]}"


AUTO: Mapping[str, Any] = {
    "classification": AutoModelForSequenceClassification, "generation": AutoModelForCausalLM,
}  # fmt: skip


def model_of(config: PretrainedConfig, kind: TaskKind) -> PreTrainedModel:
    """Weights large enough that a mix-up shows."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: PreTrainedModel = AUTO[kind].from_config(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(std=0.15)
    return model
