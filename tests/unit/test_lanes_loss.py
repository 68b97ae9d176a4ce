"""Cross-entropy a piece of the logits at a time is the cross-entropy: losses, gradients, masks, heads of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from toy import VOCAB, toy_context, toy_lanes, toy_llama, with_prompts

from fedtailor.adapters.full import FullModel
from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.evaluation.generation import response_losses
from fedtailor.federated.context import ClientContext
from fedtailor.lanes import loss as lanes_loss
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import lane_cross_entropy, lane_losses, target_losses
from fedtailor.methods.fedl2p_hypergradient import HypergradientConfig, OuterPairs
from fedtailor.training.local import backward, cross_entropy_of

SIZES = (7, 4, 1)
HEADS = ("frozen", "adapted", "trained")


class MostLogits(TorchDispatchMode):
    """Numbers of the largest new tensor whose last axis is the vocabulary; views of others are not new."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = {each.data_ptr() for each in args if isinstance(each, Tensor)}
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, Tensor) and each.dim() > 1 and each.shape[-1] == VOCAB and each.data_ptr() not in given:
                self.numbers = max(self.numbers, each.numel())
        return found


def setting(head: str, **how: Any) -> tuple[ClientContext, LaneBatch, list[str]]:
    """Lanes of unequal size with every row in one batch, and the names of what is trained; weights are not zero."""
    net = toy_llama(head=head == "adapted", **how)
    lanes = with_prompts(toy_lanes(SIZES[:1] if head == "trained" else SIZES))
    ctx = toy_context(net, lanes, FullModel() if head == "trained" else LoraAdapter(2, 2.0, Scope.EPHEMERAL))
    names = [spec.name for spec in ctx.params.specs]
    for name in [name for name in names if "lora_B" in name]:
        ctx.params.set(name, torch.linspace(-1, 1, ctx.params[name][0].numel()).view(ctx.params[name][0].shape))
    [batch] = ctx.batches([[np.arange(lane.size)] for lane in lanes])
    return ctx, batch, names


def gradient_of(ctx: ClientContext, batch: LaneBatch, names: list[str]) -> tuple[Tensor, Tensor]:
    """Losses of the lanes, and the gradient of everything that is trained."""
    ctx.params.zero_gradients()
    ctx.net.train_mode(True)
    total = backward(ctx, batch, cross_entropy_of(ctx))
    ctx.net.train_mode(False)
    return total, torch.cat([ctx.params[name].grad.flatten() for name in names])  # type: ignore[union-attr]


def cut(patch: pytest.MonkeyPatch, piece: int) -> None:
    """From now on no more than ``piece`` logits are there at once."""
    patch.setattr(lanes_loss, "WHOLE_LOGITS", piece)
    patch.setattr(lanes_loss, "PIECE_LOGITS", piece)


@pytest.mark.parametrize("targets", [1, 2, 7])
@pytest.mark.parametrize("head", HEADS)
def test_pieces_give_the_losses_and_gradients_of_the_whole(
    head: str, targets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, batch, names = setting(head)
    losses, gradient = gradient_of(ctx, batch, names)
    assert not batch.valid.all() or head == "trained", "some lanes are filled up"
    cut(monkeypatch, targets * VOCAB * batch.lanes)
    found, own = gradient_of(ctx, batch, names)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-13)
    assert own.abs().max() > 1e-3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("compute", "tolerance"), [("float32", 2e-6), ("bfloat16", 3e-2)])
def test_narrow_types_differ_by_their_rounding(
    head: str, compute: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exact = gradient_of(*setting(head))
    ctx, batch, names = setting(head, dtype=torch.float32, compute=compute)
    losses, whole = gradient_of(ctx, batch, names)
    cut(monkeypatch, 3 * VOCAB)
    found, own = gradient_of(ctx, batch, names)
    torch.testing.assert_close(found, losses, rtol=1e-6 if compute == "float32" else 1e-3, atol=0)
    error, before = ((each.double() - exact).norm() / exact.norm() for each in (own, whole))
    assert error < tolerance
    assert error < 1.2 * before + 1e-6, "not less exact than the whole"


def test_it_is_the_cross_entropy_of_the_model_at_its_responses(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, batch, _ = setting("frozen")
    ctx.net.unbind()
    cut(monkeypatch, 3 * VOCAB)
    found = lane_losses(ctx.net, batch)
    for lane, one in enumerate(ctx.lanes):
        ctx.net.state.shapes = ((1, 1),)
        texts = one.train
        own = []
        for ids, prompt, length in zip(texts.input_ids, texts.prompt_length, texts.lengths, strict=True):  # type: ignore[arg-type]
            scores = ctx.net.model(input_ids=torch.from_numpy(ids[None, :length])).logits[0, prompt - 1 : -1]
            own.append(functional.cross_entropy(scores, torch.from_numpy(ids[prompt:length]), reduction="none"))
        torch.testing.assert_close(found[lane], torch.cat(own).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("head", HEADS)
def test_no_more_logits_are_there_than_a_piece(head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, batch, names = setting(head)
    every = batch.labels.numel() * VOCAB
    with MostLogits() as most:
        gradient_of(ctx, batch, names)
    assert most.numbers == every
    cut(monkeypatch, every // 3)
    with MostLogits() as most:
        gradient_of(ctx, batch, names)
    assert 0 < most.numbers <= every // 3


def test_up_to_the_limit_nothing_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, batch, _ = setting("frozen")
    monkeypatch.setattr(lanes_loss, "WHOLE_LOGITS", batch.labels.numel() * VOCAB)
    found = lane_losses(ctx.net, batch)
    assert found.equal(lane_cross_entropy(ctx.net.logits(batch), batch))
    assert "_FrozenHeadBackward" not in graph(found)
    monkeypatch.setattr(lanes_loss, "WHOLE_LOGITS", batch.labels.numel() * VOCAB - 1)
    assert "_FrozenHeadBackward" in graph(lane_losses(ctx.net, batch))


def graph(tensor: Tensor) -> set[str]:
    """Names of the last operations that made a tensor."""
    last = {tensor.grad_fn}
    for _ in range(6):
        last |= {other for node in last if node is not None for other, _ in node.next_functions}
    return {node.name() for node in last if node is not None}


def test_lanes_one_by_one_are_cut_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, batch, names = setting("frozen")
    losses, gradient = gradient_of(ctx, batch, names)
    ctx.net.state.fused = False
    cut(monkeypatch, 2 * VOCAB)
    found, own = gradient_of(ctx, batch, names)
    torch.testing.assert_close(found, losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(own, gradient, rtol=1e-10, atol=1e-13)


def test_test_losses_are_cut_and_ask_for_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, batch, _ = setting("frozen")
    texts = [lane.train for lane in ctx.lanes]
    whole = response_losses(ctx.net, texts, 0, 1000)
    cut(monkeypatch, 2 * VOCAB)
    with torch.no_grad():
        assert not target_losses(ctx.net, batch).requires_grad
    for one, other in zip(whole, response_losses(ctx.net, texts, 0, 1000), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-10)


@pytest.mark.parametrize("terms", [0, 1])
def test_hypergradients_with_a_hessian_take_whole_logits_and_others_pieces(
    terms: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ctx, _, _ = setting("frozen")
    cfg = HypergradientConfig(terms=terms, pairs=2)
    pairs = OuterPairs.draw(ctx, [lane.train for lane in ctx.lanes], 1, cfg.pairs)
    adapter = LoraAdapter(2, 2.0, Scope.EPHEMERAL)
    whole = pairs.cotangents(adapter, 0, cfg)
    cut(monkeypatch, VOCAB)
    for one, other in zip(whole, pairs.cotangents(adapter, 0, cfg), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-13)


def test_a_second_derivative_of_pieces_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, batch, names = setting("frozen")
    cut(monkeypatch, VOCAB)
    leaf = ctx.params[names[0]]
    losses = lane_losses(ctx.net, batch).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(losses, leaf, create_graph=True)
