"""A LLaMA in a GGUF file becomes the same model as an ordinary folder; whatever is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fedtailor.core.errors import ModelError
from fedtailor.models.gguf import convert

TOKENS = ["<unk>", "<s>", "</s>", "a", "b", "Ġ", "ab", "Ġa", "1", "2", "12"]
CONFIG = LlamaConfig(
    vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=32, rms_norm_eps=1e-5, rope_theta=5000.0, tie_word_embeddings=True,
    bos_token_id=1, eos_token_id=2, pad_token_id=2,
)  # fmt: skip
NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    net = LlamaForCausalLM(CONFIG).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.2)
    return net


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp, ``convert_hf_to_gguf.py``: LlamaModel.permute."""
    split = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return split.swapaxes(1, 2).reshape(weights.shape)


def write(file: Path, model: LlamaForCausalLM, *, quantised: bool = False, **changed: Any) -> dict[str, np.ndarray]:
    """A GGUF file as llama.cpp writes it; what transformers should hold afterwards."""
    writer = GGUFWriter(file, changed.get("architecture", "llama"))
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changed.get("pre", "smollm"))
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b", "Ġ a", "1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    kept = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" or name == changed.get("without"):
            continue
        weights, stored = tensor.numpy().copy(), {"model.embed_tokens.weight": "token_embd.weight"}.get(name)
        if name == "model.norm.weight":
            stored = "output_norm.weight"
        if stored is None:
            _, _, block, *part, kind = name.split(".")
            stored = f"blk.{block}.{NAMES['.'.join(part)]}.{kind}"
        heads = {"attn_q": 4, "attn_k": 2}.get(stored.split(".")[2] if "blk" in stored else "")
        data = permuted(weights, heads) if heads else weights
        if quantised and weights.ndim == 2:
            data = quantize(data, GGMLQuantizationType.Q4_1)
            back = dequantize(data, GGMLQuantizationType.Q4_1)
            writer.add_tensor(stored, data, raw_dtype=GGMLQuantizationType.Q4_1)
            half = back.reshape(heads, -1, 2, back.shape[1]).swapaxes(1, 2).reshape(back.shape) if heads else back
            kept[name] = half
        else:
            writer.add_tensor(stored, data)
            kept[name] = weights
    if "extra" in changed:
        writer.add_tensor(changed["extra"], np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def test_the_model_gives_the_same_logits(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[1, 3, 6, 7, 8, 9, 4]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert "quantization_config" not in config
    loaded.save_pretrained(tmp_path / "again")  # what transformers' own reader of such files refuses


def test_four_bit_weights_are_what_the_library_makes_of_them(model: LlamaForCausalLM, tmp_path: Path) -> None:
    expected = write(tmp_path / "m.gguf", model, quantised=True)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    for name, weights in expected.items():
        np.testing.assert_array_equal(state[name].numpy(), weights, err_msg=name)


def test_the_tokenizer_splits_digits_and_reads_back(model: LlamaForCausalLM, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model)
    (tmp_path / "out").mkdir()
    convert(tmp_path / "m.gguf", tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_ids_to_tokens(tokenizer("ab a12</s>").input_ids) == ["ab", "Ġa", "1", "2", "</s>"]
    assert tokenizer.decode(tokenizer("ab ab 21").input_ids) == "ab ab 21"
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<s>", "</s>", "</s>", "<unk>",
    )  # fmt: skip
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"architecture": "qwen2"}, "architecture 'qwen2'; only llama is converted"),
        ({"pre": "tekken"}, "a tokenizer of kind 'gpt2', 'tekken'; known are gpt2 with smollm"),
        ({"extra": "blk.0.attn_sinks.weight"}, "tensor 'blk.0.attn_sinks.weight' belongs to no LLaMA model"),
        ({"without": "model.layers.1.mlp.up_proj.weight"}, "'model.layers.1.mlp.up_proj.weight' is missing"),
    ],
)
def test_what_is_not_understood_is_refused(
    model: LlamaForCausalLM, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    write(tmp_path / "m.gguf", model, **changed)
    (tmp_path / "out").mkdir()
    with pytest.raises(ModelError, match=message) as error:
        convert(tmp_path / "m.gguf", tmp_path / "out")
    assert "m.gguf" in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 900])
def test_a_damaged_file_is_named(model: LlamaForCausalLM, tmp_path: Path, size: int) -> None:
    write(tmp_path / "m.gguf", model)
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "m.gguf").read_bytes()[:size])
    with pytest.raises(ModelError, match=r"cut\.gguf is damaged or no GGUF file"):
        convert(tmp_path / "cut.gguf", tmp_path)
