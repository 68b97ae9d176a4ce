"""Full fine-tuning with and without embedding tables."""

from __future__ import annotations

import pytest
import torch
from toy import toy_context, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.adapters.full import FullModel
from fedtailor.core.scope import Scope
from fedtailor.lanes.adam import AdamGroup
from fedtailor.training.local import Training, train


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_without_embeddings_everything_else_is_trained(kind: str) -> None:
    net = toy_net() if kind == "classification" else toy_llama()
    lanes = toy_lanes([6]) if kind == "classification" else with_prompts(toy_lanes([6]))
    before = {name: value.clone() for name, value in FullModel().initial(net, 0).items()}
    ctx = toy_context(net, lanes, FullModel(embeddings=False))
    names = tuple(spec.name for spec in ctx.params.specs)
    tables = {name for name in before if "embed" in name and "norm" not in name.lower()}
    assert set(names) == set(before) - tables
    assert tables
    train(ctx, [AdamGroup(names, 1e-2)], Training(1, 4))
    after = dict(zip(before, net.model.parameters(), strict=True))
    assert all(torch.equal(after[name], before[name]) for name in tables)
    assert not any(torch.equal(after[name], before[name]) for name in names if not name.endswith("key.bias"))
    assert ctx.params.flat(Scope.SHARED).shape[1] == sum(before[name].numel() for name in names)
