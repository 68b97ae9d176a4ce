"""Nothing stays behind on the CPU when a model is on a card: the same numbers, on a GPU that is pretended."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from pretend_gpu import CARD, pretended_gpu
from torch import Tensor
from toy import toy_context, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.adapters.bayestune_lora import BayesTuneLora
from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.core.settings import DecodingConfig
from fedtailor.evaluation.decoding import Decoding, answer
from fedtailor.federated.context import Lane
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.training.bayestune import RankSearchConfig, search_ranks
from fedtailor.training.local import Training, train
from fedtailor.training.pruning import prune

CLASSIFIER, TALKER = (toy_net, toy_lanes([9, 5])), (toy_llama, with_prompts(toy_lanes([9, 5])))


def placed(make: Callable[[], LaneNet], device: str) -> LaneNet:
    net = make()
    net.model.to(device)
    assert net.device.type == device
    return net


def lora_trained(net: LaneNet, lanes: Sequence[Lane]) -> Tensor:
    ctx = toy_context(net, lanes, LoraAdapter(2, 2.0, Scope.SHARED), micro_batch=3)
    names = tuple(spec.name for spec in ctx.params.specs)
    trace = train(ctx, [AdamGroup(names, 1e-2)], Training(2, 4, max_grad_norm=0.1, dropout=0.25))
    return torch.cat([trace.loss.cpu(), ctx.params.flat(Scope.SHARED).detach().cpu().flatten()])


def ranks_searched(net: LaneNet, lanes: Sequence[Lane]) -> Tensor:
    ctx = toy_context(net, lanes, BayesTuneLora(4, 2.0))
    start = torch.full((len(lanes), len(net.adapted), 4), 1e-2).to(ctx.sizes)
    lam, metrics = search_ranks(ctx, start, RankSearchConfig(lr=1e-2, batch_size=4, epochs=2))
    kept = prune(lam, [1] * len(lanes)).keep
    return torch.cat([x.detach().cpu().double().flatten() for x in (lam, kept, *metrics.values())])


def features_read(net: LaneNet, lanes: Sequence[Lane]) -> Tensor:
    return client_features(net, lanes[0].train, 0)


@pytest.mark.parametrize(
    ("made", "what"),
    [(CLASSIFIER, lora_trained), (CLASSIFIER, ranks_searched), (TALKER, lora_trained), (TALKER, features_read)],
    ids=["classifier-lora", "classifier-ranks", "talker-lora", "talker-features"],
)
def test_a_card_gives_what_the_cpu_gives(
    made: tuple[Callable[[], LaneNet], Sequence[Lane]], what: Callable[[LaneNet, Sequence[Lane]], Tensor]
) -> None:
    make, lanes = made
    expected = what(placed(make, "cpu"), lanes)
    with pretended_gpu():
        found = what(placed(make, "cuda"), lanes)
    assert torch.equal(found, expected)


def test_answers_on_a_card_are_those_of_the_cpu() -> None:
    how = Decoding(DecodingConfig(max_new_tokens=4, repetition_penalty=1.2), stop_ids=(3,), pad_id=0)
    prompts = [[np.arange(5, 9), np.arange(20, 27)], [np.arange(40, 43)]]
    found = []
    for device in ("cpu", "cuda"):
        with pretended_gpu():
            net = placed(toy_llama, device)
            toy_context(net, toy_lanes([5, 4]), LoraAdapter(2, 2.0, Scope.SHARED))
            found.append(answer(net, prompts, how))
    assert found[0] == found[1]
    assert [len(lane) for lane in found[1]] == [2, 1]


def test_the_pretended_card_tells_devices_apart() -> None:
    with pretended_gpu():
        there = torch.ones(3, device="cuda")
        assert there.device == CARD
        with pytest.raises(RuntimeError, match="expected all tensors to be on cuda:0"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="indices should be on the same device"):
            torch.ones(3)[there.long()]
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        assert (there + 1).cpu().numpy().tolist() == [2.0, 2.0, 2.0]
