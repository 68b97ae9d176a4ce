"""How the frozen base is kept: narrower weights, activations computed again, and what comes out as a base."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy import toy_context, toy_lanes, toy_llama, with_prompts

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.errors import ConfigError, PlacementError
from fedtailor.core.scope import Scope
from fedtailor.core.settings import ModelConfig
from fedtailor.experiment import rules as model_rules
from fedtailor.experiment.compose import compose
from fedtailor.experiment.stage_results import Mergeable, write_merged
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.methods import build_method
from fedtailor.models import embedded, hub
from fedtailor.models.load import load_causal
from fedtailor.training.local import Training, train
from fedtailor.worker.open_stage import load_net

IN_BFLOAT16 = ModelConfig(weights="bfloat16")
CFG = ModelConfig(name="tiny-llama", hidden_size=16, heads=2, layers=2, intermediate_size=24, vocab_size=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build_embedded(
        ["one two three", "four"] * 9, (), CFG, 32, 1, tmp_path_factory.mktemp("weights") / "tiny"
    )


# --- checkpointing


def trained(sizes: Sequence[int], checkpointing: bool, steps: int) -> ClientContext:
    """LoRA after some steps of Adam with adapter dropout."""
    net = toy_llama(torch.float64, checkpointing)
    ctx = toy_context(net, with_prompts(toy_lanes(sizes)), LoraAdapter(2, 2.0, Scope.SHARED))
    names = tuple(s.name for s in ctx.params.of_scope(Scope.SHARED))
    with torch.no_grad():
        for number, name in enumerate(names):  # B starts at zero, and would hide what A gets
            value = ctx.params[name]
            value.add_(0.1 * torch.sin(torch.arange(value.numel()).view_as(value) + number))
    train(ctx, [AdamGroup(names, 1e-2)], Training(steps, max(sizes), dropout=0.3))
    return ctx


@pytest.mark.parametrize("sizes", [[5], [7, 5, 3]], ids=["one lane", "three lanes"])
def test_computing_blocks_again_changes_neither_gradients_nor_parameters(sizes: list[int]) -> None:
    kept, again = (trained(sizes, checkpointing, steps=3) for checkpointing in (False, True))
    assert again.net.checkpointing
    torch.testing.assert_close(again.params.flat(Scope.SHARED), kept.params.flat(Scope.SHARED), rtol=1e-12, atol=1e-14)
    for name in (s.name for s in kept.params.of_scope(Scope.SHARED)):
        last, other = kept.params[name].grad, again.params[name].grad
        assert last is not None
        assert other is not None
        assert last.abs().sum() > 0
        torch.testing.assert_close(other, last, rtol=1e-12, atol=1e-14)


def test_a_block_is_computed_again_with_the_batch_and_masks_of_its_own_forward_pass() -> None:
    def gradients(checkpointing: bool, between: bool) -> list[Tensor]:
        net = toy_llama(torch.float64, checkpointing)
        ctx = toy_context(net, with_prompts(toy_lanes([6, 4])), LoraAdapter(2, 2.0, Scope.SHARED))
        names = [s.name for s in ctx.params.of_scope(Scope.SHARED)]
        with torch.no_grad():
            for name in names:
                ctx.params[name].add_(0.1)
        first, *_ = ctx.batches(ctx.training_order(1, 6, "train"))
        other, *_ = ctx.batches(ctx.training_order(1, 2, "other"))
        ctx.use_dropout(0.3, "train")
        net.train_mode(True)
        loss = lane_cross_entropy(net.logits(first), first).sum()
        if between:
            net.logits(other)
        return list(torch.autograd.grad(loss, [ctx.params[name] for name in names]))

    for expected, found in zip(gradients(False, False), gradients(True, True), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# --- types


def test_a_bfloat16_base_carries_float32_adapters(tiny: Path) -> None:
    net = load_net(tiny, IN_BFLOAT16, (), "generation", dtype="bfloat16")
    assert {parameter.dtype for parameter in net.model.parameters()} == {torch.bfloat16}
    assert net.param_dtype == torch.float32
    ctx = toy_context(net, with_prompts(toy_lanes([4, 3])), LoraAdapter(2, 2.0, Scope.SHARED))
    names = tuple(s.name for s in ctx.params.of_scope(Scope.SHARED))
    before = ctx.params.flat(Scope.SHARED).clone()
    trace = train(ctx, [AdamGroup(names, 1e-2)], Training(1, 4))
    assert ctx.params.flat(Scope.SHARED).dtype == torch.float32
    assert (ctx.params.flat(Scope.SHARED) != before).any()
    assert torch.isfinite(trace.loss).all()


def test_the_base_that_a_lora_stage_leaves_is_float32_whatever_it_was_kept_in(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "model"))
    load_causal(folder, torch.bfloat16).save_pretrained(folder)
    method = build_method("fedavg", {"adapter": "lora", "rank": 2}, 2)
    assert method.adapter is not None
    net = load_net(folder, IN_BFLOAT16, (), "generation", dtype="bfloat16")
    tensors = {s.name: 1e-3 + torch.zeros(s.shape).numpy() for s in method.adapter.specs(net)}
    assert isinstance(method.adapter, Mergeable)
    write_merged(folder, (), method.adapter, tensors, tmp_path / "base", "generation")
    old, new = load_causal(folder), load_causal(tmp_path / "base")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = 2.0 * 2 * 1e-6  # scale * rank * a * b
    moved = new.get_parameter(name) - old.get_parameter(name)
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-2, atol=0)
    assert torch.equal(new.lm_head.weight, old.lm_head.weight)
    assert hub.load_tokenizer(tmp_path / "base").chat_template == embedded.CHAT_TEMPLATE
    hub.check_available(ModelConfig(name=str(tmp_path / "base")), 32, "generation")


# --- what is refused

BF16 = ["task=cldr_instruct", "model.weights=bfloat16"]


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([*BF16, "base=none"], "bfloat16 needs engine.dtype=bfloat16"),
        ([*BF16, "engine.dtype=bfloat16"], "fedavg trains every weight .*fedavg.adapter=lora, base=none"),
        ([*BF16, "engine.dtype=bfloat16", "base=dept"], "dept trains every weight"),
        (["model.weights=4bit", "engine.dtype=bfloat16", "base=none"], "4bit is for language models, and task 'cldr'"),
        (["task=cldr_instruct", "model.weights=8bit", "engine.dtype=bfloat16", "base=none"], "8bit needs a GPU"),
        (
            ["task=cldr_instruct", "model.weights=4bit", "engine.dtype=bfloat16", "base=none", "engine.zero.ranks=2"],
            "4bit cannot be partitioned",
        ),
    ],
)
def test_weights_that_cannot_serve_are_refused_before_work(overrides: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        compose([], overrides)


def test_a_frozen_base_and_one_that_trains_lora_may_be_kept_in_bfloat16() -> None:
    for base in (["base=none"], ["fedavg.adapter=lora"]):
        assert compose([], [*BF16, "engine.dtype=bfloat16", *base]).model.weights == "bfloat16"


def test_quantised_weights_need_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["task=cldr_instruct", "model.weights=4bit", "engine.dtype=bfloat16", "base=none", "engine.num_gpus=1"]
    exp = compose([], words)
    monkeypatch.setattr(model_rules, "find_spec", lambda name: None)
    with pytest.raises(PlacementError, match=r"4bit needs the package bitsandbytes"):
        model_rules.check_weights(exp)
    model_rules.check_weights(compose([], ["task=cldr_instruct"]))


def test_the_model_follows_the_task_unless_it_is_named() -> None:
    assert compose([], ["task=cldr_instruct"]).model == ModelConfig(name="tiny-llama")
    assert compose([], ["task=cldr_instruct", "model.layers=1"]).model == ModelConfig(name="tiny-llama", layers=1)
    assert compose([], ["task=cldr_instruct", "model=llama-3.2-3b"]).model.name == "llama-3.2-3b"
    assert compose([], []).model == ModelConfig(name="tiny-bert")
