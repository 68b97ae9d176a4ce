"""A LLaMA model out of a GGUF file: float32 weights, and configuration and tokenizer as Hugging Face has them.

Transformers reads such files too, but parses their metadata twice, keeps the model marked as quantised, so that it
cannot be saved, and leaves out how the tokenizer splits digits. Here the file is read once, and a file with anything
that is not understood is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fedtailor.core.errors import ModelError, reported_as

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig  # late otherwise: it takes seconds, and all that name a model import this file

_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Names inside a block, in a GGUF file and in transformers' LLaMA."""

_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}

_SPLITS: dict[str, list[Any]] = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [
        pre_tokenizers.Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            behavior="isolated",
        ),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ],
}
"""``tokenizer.ggml.pre`` -> how a text is split before byte pairs are merged (llama.cpp, ``llama-vocab.cpp``)."""

_CONTROL, _USER_DEFINED = 3, 4


def convert(file: Path, folder: Path) -> None:
    """Writes ``config.json``, ``generation_config.json``, ``model.safetensors`` and the tokenizer of a GGUF file.

    Args:
        file: a LLaMA model with a byte-level BPE tokenizer.
        folder: an existing folder.

    Raises:
        ModelError: the package ``gguf`` is missing, or the file is damaged or of another kind; says what it is.
    """
    reader = _read(file)
    architecture = _value(reader, "general.architecture")
    if architecture != "llama":
        raise ModelError(f"{file}: a GGUF file of architecture '{architecture}'; only llama is converted")
    config = _config(reader)
    tensors = _tensors(reader, config, file)
    _check_shapes(config, tensors, file)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    ends = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ends).save_pretrained(folder)  # type: ignore[no-untyped-call]
    _tokenizer(reader, config, file).save_pretrained(folder)


def _read(file: Path) -> GGUFReader:
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise ModelError(f"{file}: reading it needs the package gguf: pip install 'fedtailor[gguf]'") from error
    with reported_as(ModelError, f"{file} is damaged or no GGUF file", Exception):
        return GGUFReader(file)


def _value(reader: GGUFReader, key: str, default: Any = None) -> Any:
    field = reader.fields.get(key)
    return default if field is None else field.contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    heads = _value(reader, "llama.attention.head_count")
    return LlamaConfig(
        vocab_size=len(_value(reader, "tokenizer.ggml.tokens")),
        hidden_size=_value(reader, "llama.embedding_length"),
        intermediate_size=_value(reader, "llama.feed_forward_length"),
        num_hidden_layers=_value(reader, "llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_value(reader, "llama.attention.head_count_kv", heads),
        max_position_embeddings=_value(reader, "llama.context_length"),
        # The file holds a float32; the shortest decimal number that it stands for was meant.
        rms_norm_eps=float(str(np.float32(_value(reader, "llama.attention.layer_norm_rms_epsilon")))),
        rope_parameters={"rope_type": "default", "rope_theta": float(_value(reader, "llama.rope.freq_base", 1e4))},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=_value(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_value(reader, "tokenizer.ggml.eos_token_id"),
        pad_token_id=_value(reader, "tokenizer.ggml.padding_token_id"),
    )


def _tensors(reader: GGUFReader, config: LlamaConfig, file: Path) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    tensors = {}
    for stored in reader.tensors:
        weights = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        name = _WHOLE.get(stored.name)
        if name is None:
            *block, part, kind = stored.name.split(".")
            if block[:1] != ["blk"] or len(block) != 2 or part not in _TENSORS:
                raise ModelError(f"{file}: tensor '{stored.name}' belongs to no LLaMA model that is known here")
            name = f"model.layers.{block[1]}.{_TENSORS[part]}.{kind}"
            if part in ("attn_q", "attn_k"):
                heads = config.num_attention_heads if part == "attn_q" else config.num_key_value_heads
                assert heads is not None
                weights = _halves(weights, heads)
        tensors[name] = torch.from_numpy(weights).contiguous()
    return tensors


def _halves(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows (heads * d, in) whose rotated pairs are neighbours, as llama.cpp has them, to pairs (i, i + d/2)."""
    rows, columns = weights.shape
    return weights.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _check_shapes(config: LlamaConfig, tensors: dict[str, torch.Tensor], file: Path) -> None:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        expected = LlamaForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight")
    for name in sorted(expected.keys() ^ tensors.keys()):
        raise ModelError(f"{file}: tensor '{name}' is {'missing' if name in expected else 'one too many'}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{file}: '{name}' is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")


def _tokenizer(reader: GGUFReader, config: LlamaConfig, file: Path) -> PreTrainedTokenizerFast:
    kind, split = _value(reader, "tokenizer.ggml.model"), _value(reader, "tokenizer.ggml.pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise ModelError(f"{file}: a tokenizer of kind '{kind}', '{split}'; known are gpt2 with {', '.join(_SPLITS)}")
    tokens = _value(reader, "tokenizer.ggml.tokens")
    types = _value(reader, "tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in _value(reader, "tokenizer.ggml.merges")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_SPLITS[split])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, its in zip(tokens, types, strict=True) if its == _CONTROL])
    tokenizer.add_tokens([token for token, its in zip(tokens, types, strict=True) if its == _USER_DEFINED])
    named = {
        "bos_token": config.bos_token_id,
        "eos_token": config.eos_token_id,
        "pad_token": config.pad_token_id,
        "unk_token": _value(reader, "tokenizer.ggml.unknown_token_id"),
    }
    fast: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in named.items() if i is not None},
    )
    fast.chat_template = _value(reader, "tokenizer.chat_template")
    return fast
