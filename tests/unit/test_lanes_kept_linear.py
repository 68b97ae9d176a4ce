"""A frozen linear layer keeps its weights in the type of products: the same bits, cast once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from toy import toy_context, toy_lanes, toy_llama, with_prompts

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.layers import KeptLinear, keep_narrow
from fedtailor.training.local import Training, train


def kept(bias: bool = True) -> KeptLinear:
    layer = nn.Sequential(nn.Linear(5, 3, bias=bias).requires_grad_(False))
    keep_narrow(layer)
    assert isinstance(layer[0], KeptLinear)
    return layer[0]


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_bits_as_autocast_gives(bias: bool) -> None:
    layer, x = kept(bias), torch.randn(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.Linear.forward(layer, x))
    assert torch.equal(layer(x), nn.Linear.forward(layer, x)), "outside of autocast it is the layer that it was"


def test_weights_are_cast_once_and_again_when_they_change() -> None:
    layer, x = kept(), torch.randn(4, 5)
    first = layer.narrow(torch.bfloat16)[0]
    assert layer.narrow(torch.bfloat16)[0] is first
    with torch.no_grad():
        layer.weight.add_(1.0)
    assert torch.equal(layer.narrow(torch.bfloat16)[0], layer.weight.bfloat16())
    layer.weight.data = torch.zeros(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.Linear.forward(layer, x))


def test_trained_weights_get_their_gradient() -> None:
    layer, x = kept(), torch.randn(4, 5)
    layer.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().max() > 0


def test_other_classes_of_layers_stay_what_they_are() -> None:
    class Own(nn.Linear):
        pass

    layers = nn.Sequential(Own(2, 2), nn.Embedding(2, 2))
    keep_narrow(layers)
    assert [type(layer) for layer in layers] == [Own, nn.Embedding]


def test_training_in_bfloat16_is_what_it_is_with_weights_cast_at_every_call() -> None:
    def trained(keeps: bool) -> torch.Tensor:
        net = toy_llama(torch.float32, compute="bfloat16")
        layers = [module for module in net.model.modules() if type(module) is KeptLinear]
        assert len(layers) == 15, "seven of each block, and the output embedding"
        for layer in layers if not keeps else []:
            layer.__class__ = nn.Linear
        ctx = toy_context(net, with_prompts(toy_lanes([6, 3])), LoraAdapter(2, 2.0, Scope.EPHEMERAL))
        train(ctx, [AdamGroup(tuple(spec.name for spec in ctx.params.specs), 1e-2)], Training(1, 4))
        return ctx.params.flat(Scope.EPHEMERAL).clone()

    assert torch.equal(trained(True), trained(False))
