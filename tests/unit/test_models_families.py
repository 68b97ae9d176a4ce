"""Which linear layers carry adapters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedtailor.core.errors import ModelError
from fedtailor.lanes.layers import AdaptedLayer
from fedtailor.models.families import adapted_linears, check_kind, embedding_names


def bert(layers: int = 2) -> BertForSequenceClassification:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    with torch.device("meta"):
        return BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes))


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 20}
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=3, num_key_value_heads=1, **sizes))


def gpt2() -> GPT2ForSequenceClassification:
    with torch.device("meta"):
        return GPT2ForSequenceClassification(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=20))


def test_a_twelve_layer_bert_classifier_has_74_with_pooler_and_classifier_last() -> None:
    names = [name for name, _ in adapted_linears(bert(12))]
    assert len(names) == 74
    assert names[-2:] == ["bert.pooler.dense", "classifier"]
    assert names[0] == "bert.encoder.layer.0.attention.self.query"


def test_a_llama_block_has_seven_and_the_output_embedding_none() -> None:
    names = [name for name, _ in adapted_linears(llama())]
    assert len(names) == 3 * 7
    assert "lm_head" not in names


@pytest.mark.parametrize("model", [bert(), llama(), gpt2()], ids=["bert", "llama", "gpt2"])
def test_the_layers_are_those_that_peft_adapts_for_all_linear(model: nn.Module) -> None:
    expected = [name for name, _ in adapted_linears(model)]
    adapted = get_peft_model(model, LoraConfig(r=1, target_modules="all-linear"))
    found = [name for name, layer in adapted.base_model.model.named_modules() if isinstance(layer, LoraLayer)]
    assert expected == found


def test_layers_come_in_the_order_of_the_model_not_of_the_targets() -> None:
    chosen = adapted_linears(bert(), ("value", "query"))
    assert [name.rsplit(".", 1)[-1] for name, _ in chosen] == ["query", "value"] * 2
    assert all(isinstance(layer, nn.Linear) for _, layer in chosen)


def test_a_target_matches_whole_path_parts_only() -> None:
    names = [name for name, _ in adapted_linears(bert(12), ("layer.1.output.dense",))]
    assert names == ["bert.encoder.layer.1.output.dense"]
    with pytest.raises(ModelError, match="ery"):
        adapted_linears(bert(), ("ery",))


def test_an_unknown_target_is_named_with_the_endings_that_exist() -> None:
    with pytest.raises(ModelError, match=r"q_proj.*classifier \(1\), dense \(7\), key \(2\)") as caught:
        adapted_linears(bert(), ("query", "q_proj"))
    assert "ends in ['q_proj']" in str(caught.value)


def test_a_head_that_marks_spans_tells_no_classes() -> None:
    config = bert().config
    check_kind(config, "classification", "mine")
    config.architectures = ["BertForQuestionAnswering"]
    check_kind(config, "extraction", "mine")
    with pytest.raises(ModelError, match=r"^mine: its head marks spans.*BertForQuestionAnswering.*asks for classes"):
        check_kind(config, "classification", "mine")


def test_no_target_at_all_is_refused() -> None:
    with pytest.raises(ModelError, match=r"model\.targets"):
        adapted_linears(bert(), ())


def test_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        adapted_linears(nn.Sequential(nn.Embedding(3, 2)))


def test_a_gpt2_block_has_four_layers_whose_weight_is_transposed() -> None:
    found = adapted_linears(gpt2())
    assert [name.removeprefix("transformer.h.0.") for name, _ in found] == [
        "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "score",
    ]  # fmt: skip
    layers = [AdaptedLayer.of(*pair) for pair in found]
    assert [(x.d_in, x.d_out) for x in layers] == [(8, 24), (8, 8), (8, 32), (32, 8), (8, 2)]
    assert [x.transposed for x in layers] == [True] * 4 + [False]
    assert [name for name, _ in adapted_linears(gpt2(), ("score",))] == ["score"]


def test_embedding_names_are_the_tables_and_not_their_layer_norm() -> None:
    assert embedding_names(bert()) == [
        f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")
    ]
