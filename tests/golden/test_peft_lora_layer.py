"""One lane of our LoRA is peft's LoRA: forward and gradients."""

from __future__ import annotations

import copy

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from toy import toy_context, toy_lanes, toy_net

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_cross_entropy


def test_forward_and_gradients_equal_peft() -> None:
    plain = copy.deepcopy(toy_net().model)
    for module in list(plain.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LaneLinear":
                setattr(module, name, child.base)
    net = toy_net()
    ctx = toy_context(net, toy_lanes([6]), LoraAdapter(4, 1.7, Scope.EPHEMERAL))
    config = LoraConfig(r=4, lora_alpha=1.7 * 4, target_modules=list(net.modules), lora_dropout=0.0)
    theirs = get_peft_model(plain, config, autocast_adapter_dtype=False).eval().double()
    layers = {name.removeprefix("base_model.model."): m for name, m in theirs.named_modules() if hasattr(m, "lora_A")}
    assert set(layers) == set(net.modules)
    rng = torch.Generator().manual_seed(0)
    for name, layer in layers.items():
        b = torch.randn(layer.lora_B["default"].weight.shape, generator=rng, dtype=torch.float64) * 0.1
        ctx.params.set(f"lora_B.{name}", b)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(ctx.params[f"lora_A.{name}"][0])
            layer.lora_B["default"].weight.copy_(b)
    lane = ctx.lanes[0].train
    batch = make_batch([lane], [np.arange(6)], 0)
    ours = net.logits(batch)
    reference = theirs(input_ids=batch.input_ids[0], attention_mask=batch.attention_mask[0]).logits
    torch.testing.assert_close(ours[0], reference, rtol=1e-10, atol=1e-12)
    lane_cross_entropy(ours, batch).sum().backward()
    torch.nn.functional.cross_entropy(reference, batch.labels[0]).backward()
    for name, layer in layers.items():
        for matrix in "AB":
            grad = getattr(layer, f"lora_{matrix}")["default"].weight.grad
            torch.testing.assert_close(ctx.params[f"lora_{matrix}.{name}"].grad[0], grad, rtol=1e-8, atol=1e-12)
