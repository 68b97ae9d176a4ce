"""Lanes are exact on every architecture: side by side where its layers allow it, else one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from fedtailor.core.errors import ModelError
from fedtailor.lanes.batches import Examples, LaneBatch, make_batch
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.probe import probe
from fedtailor.models.families import adapted_linears, notices

SIZES: dict[str, Any] = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_labels": 3,
}  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
ONE_BY_ONE = {
    "deberta": RELATIVE,
    "deberta-v2": {**RELATIVE, "share_att_key": True, "position_buckets": 16, "norm_rel_ebd": "layer_norm"},
    "longformer": {"attention_window": 8},
}
FUSED = {
    "bert": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
    "albert": {"embedding_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    "funnel": {
        "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "num_hidden_layers": None,
    },
    "bart": {
        "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    },
    "t5": {
        "d_model": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4, "d_kv": 8, "d_ff": 48,
        "decoder_start_token_id": 0,
    },
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {"head_dim": 8, "num_key_value_heads": 2},
}  # fmt: skip


def net_of(kind: str, auto: Any = AutoModelForSequenceClassification, **more: Any) -> LaneNet:
    sizes = {**SIZES, **{**ONE_BY_ONE, **FUSED}.get(kind, {}), **more}
    config = AutoConfig.for_model(kind, **{key: value for key, value in sizes.items() if value is not None})
    torch.manual_seed(0)
    model = auto.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    net = LaneNet(model, adapted_linears(model))
    probe(net, 0)
    return net


def bind(net: LaneNet, lanes: range) -> None:
    rng = torch.Generator().manual_seed(5)
    for layer, adapted in zip(net.layers, net.adapted, strict=True):
        a, b = torch.randn(3, 2, adapted.d_in, generator=rng), torch.randn(3, adapted.d_out, 2, generator=rng)
        layer.bind(a[lanes] * 0.1, b[lanes] * 0.1, None, 1.0)


def texts(lanes: range) -> LaneBatch:
    """Three clients' rows, of other numbers and lengths each; the end token where a text ends."""
    rng = torch.Generator().manual_seed(7)
    examples = []
    for rows, width in ((3, 9), (2, 12), (1, 5)):
        ids = torch.randint(60, 120, (rows, width), generator=rng)
        ids[:, -1] = 2
        lengths = torch.full((rows,), width)
        examples.append(Examples(ids.numpy(), lengths.numpy(), torch.zeros(rows, dtype=torch.int64).numpy()))
    return make_batch([examples[i] for i in lanes], [np.arange(len(examples[i])) for i in lanes], 0)


@pytest.mark.parametrize("kind", [*ONE_BY_ONE, *FUSED])
def test_three_lanes_are_three_runs(kind: str) -> None:
    net = net_of(kind)
    assert bool(net.one_by_one) == (kind in ONE_BY_ONE)
    bind(net, range(3))
    together = net.logits(texts(range(3)))
    for lane, rows in enumerate((3, 2, 1)):
        own = range(lane, lane + 1)
        bind(net, own)
        alone = net.logits(texts(own))[0]
        torch.testing.assert_close(together[lane, :rows], alone[:rows], rtol=1e-4, atol=1e-5)
    bind(net, range(3))
    assert not torch.allclose(together[0, 0], together[1, 0], atol=1e-3)


@pytest.mark.parametrize("kind", list(ONE_BY_ONE))
def test_gradients_reach_each_lanes_own_adapter(kind: str) -> None:
    net = net_of(kind)
    bind(net, range(3))
    for layer in net.layers:
        layer.a.requires_grad_()
    net.logits(texts(range(3)))[1].sum().backward()
    grads = torch.stack([layer.a.grad.abs().sum((1, 2)) for layer in net.layers])
    assert grads[:, [0, 2]].abs().max() == 0
    assert (grads[:, 1] > 0).any()


@pytest.mark.parametrize("kind", [*ONE_BY_ONE, "funnel", "t5"])
def test_features_are_finite_and_do_not_see_padding(kind: str) -> None:
    net, batch = net_of(kind), texts(range(1))
    rows = Examples(batch.input_ids[0].numpy(), batch.attention_mask[0].sum(1).numpy(), batch.labels[0].numpy())
    found = client_features(net, rows, 0)
    assert found.shape == (2 * len(net.adapted),)
    assert torch.isfinite(found).all()


class Sorting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        order = torch.arange(len(flat)).flip(0)
        return self.inner(flat[order])[order].view(*x.shape[:2], -1)


def test_a_layer_that_gathers_tokens_of_all_rows_is_found_by_its_numbers() -> None:
    """As a mixture of experts does: the layer sees flat tokens, in another order."""

    model = sorting_bert()
    net = LaneNet(model, adapted_linears(model))
    probe(net, 0)
    assert net.one_by_one == (
        "BertForSequenceClassification: two clients in one forward pass change each other's scores"
    )


def test_a_model_that_reads_its_padding_is_refused() -> None:
    """XLNet is summed up by its last token, which is padding where a text is not the longest."""
    with pytest.raises(
        ModelError, match="XLNetForSequenceClassification: the padding beside a text changes its scores"
    ):
        net_of("xlnet", d_model=32, n_layer=2, n_head=4, d_inner=48, max_position_embeddings=None)


def test_a_decoder_that_is_told_another_padding_token_is_refused() -> None:
    with pytest.raises(ModelError, match="Qwen2ForSequenceClassification: the padding beside a text"):
        net_of("qwen2", num_key_value_heads=2, pad_token_id=5)


def test_causal_models_are_probed_too() -> None:
    assert not net_of("llama", AutoModelForCausalLM, num_key_value_heads=2).one_by_one


def sorting_bert() -> BertForSequenceClassification:
    """Its intermediate layer sees flat tokens, in another order."""
    model = BertForSequenceClassification(BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )).eval()  # fmt: skip
    block = model.bert.encoder.layer[0]
    block.intermediate.dense = Sorting(block.intermediate.dense)
    return model


def test_weights_of_a_narrow_type_are_compared_in_a_wide_one_and_stay_what_they_are() -> None:
    model = sorting_bert().bfloat16()
    before = [parameter.data_ptr() for parameter in model.parameters()]
    net = LaneNet(model, adapted_linears(model), "bfloat16")
    probe(net, 0)
    assert net.one_by_one.endswith("two clients in one forward pass change each other's scores")
    assert [parameter.data_ptr() for parameter in net.model.parameters()] == before


def test_a_layer_whose_weight_is_read_past_it_is_named_and_its_features_are_zero() -> None:
    model = sorting_bert()
    dense = model.bert.encoder.layer[0].output.dense
    model.bert.encoder.layer[0].output.register_forward_pre_hook(
        lambda module, inputs: (nn.functional.linear(inputs[0], dense.weight), inputs[1])
    )
    model.bert.encoder.layer[0].output.dense = nn.Identity()
    model.bert.encoder.layer[0].output.unused = dense
    net = LaneNet(model, adapted_linears(model))
    probe(net, 0)
    assert net.idle == ("bert.encoder.layer.0.output.unused",)
    said = notices(net, "all-linear")
    assert said[-1] == (
        "the model does not call 1 of its 8 adapted layers, so that their adapters change nothing: "
        "bert.encoder.layer.0.output.unused"
    )
    rows = Examples(np.full((2, 5), 9), np.array([5, 3]), np.array([0, 0]))
    assert client_features(net, rows, 0).reshape(-1, 2)[net.modules.index(net.idle[0])].tolist() == [0, 0]


def test_a_language_model_that_sees_what_follows_is_refused() -> None:
    """Encoders that transformers lists as causal are refused by name; this is for those nobody knows."""
    config = AutoConfig.for_model("llama", **SIZES, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.model.register_forward_pre_hook(open_mask, with_kwargs=True)
    net = LaneNet(model, adapted_linears(model))
    with pytest.raises(ModelError, match="LlamaForCausalLM: a token's scores depend on the tokens that follow it"):
        probe(net, 0)


def open_mask(module: nn.Module, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    size = named["input_ids"].shape
    return inputs, named | {"attention_mask": torch.zeros(size[0], 1, size[1], size[1])}


def test_matrices_that_are_no_layers_are_named_once_for_all_blocks() -> None:
    net = net_of("mixtral", num_key_value_heads=2, num_local_experts=4)
    assert notices(net, "all-linear") == (
        "no adapter for weights that are not layers of their own: model.layers.*.mlp.gate.weight, "
        "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj",
    )
    assert notices(net, ("q_proj",)) == ()
    assert notices(net_of("bert"), "all-linear") == ()


def test_a_model_that_breaks_with_adapters_is_refused_with_its_name() -> None:
    model = BertForSequenceClassification(BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )).eval()  # fmt: skip
    inside: Callable[[Any, Any], None] = lambda module, inputs: module.no_such_name  # noqa: E731
    model.classifier.register_forward_pre_hook(inside)
    net = LaneNet(model, adapted_linears(model))
    with pytest.raises(ModelError, match=r"BertForSequenceClassification does not run with adapters: AttributeError"):
        probe(net, 0)
    assert net.layers[0].a is None
