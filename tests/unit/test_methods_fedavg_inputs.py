"""FedAvg on whole texts: prompts are learned with responses, as FedIT does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny
from toy import toy_context, toy_lanes, toy_llama, with_prompts

from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import Scope
from fedtailor.experiment.stages import named_by
from fedtailor.lanes.batches import make_batch
from fedtailor.methods import build_method
from fedtailor.methods.fedavg import FedAvgConfig, without_prompts

HOW = {"adapter": "lora", "rank": 2, "lr": 5e-3, "batch_size": 16, "epochs": 1}


def trained(train_on_inputs: bool, prompts: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """What is sent and the loss, (K, P) and (K,)."""
    method, lanes = (
        build_method("fedavg", HOW | {"train_on_inputs": train_on_inputs}, 2),
        with_prompts(toy_lanes([6, 4])),
    )
    if not prompts:
        lanes = [replace(x, train=replace(x.train, prompt_length=np.ones(x.size, np.int64))) for x in lanes]
    ctx = toy_context(toy_llama(), lanes, method.adapter)
    report = method.local_update(ctx)  # type: ignore[misc]
    return ctx.params.flat(Scope.SHARED).detach(), report.metrics["train_loss"]


def test_every_token_but_the_first_is_a_target() -> None:
    lanes = with_prompts(toy_lanes([6, 4]))
    batch = make_batch([without_prompts(x.train) for x in lanes], [np.arange(6), np.arange(4)], 0)
    assert batch.valid.sum(1).tolist() == [int((x.train.lengths - 1).sum()) for x in lanes]
    for k, lane in enumerate(lanes):
        first = batch.labels[k, : int(lane.train.lengths[0]) - 1]
        assert first.tolist() == lane.train.input_ids[0, 1 : lane.train.lengths[0]].tolist()


def test_prompts_are_learned_as_if_they_were_responses() -> None:
    (own, loss), (other, expected) = trained(True), trained(False, prompts=False)
    assert torch.equal(own, other)
    assert torch.equal(loss, expected)
    assert not torch.equal(own, trained(False)[0])


def test_a_task_without_responses_has_no_inputs_to_learn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'fedavg.train_on_inputs' = true: task '.* has no prompts"):
        tiny(tmp_path, "fedavg.train_on_inputs=true")


def test_artifacts_of_responses_keep_their_names() -> None:
    assert "train_on_inputs" not in named_by(FedAvgConfig())
    assert named_by(FedAvgConfig(train_on_inputs=True))["train_on_inputs"] is True
