"""What a model that spans ranks cannot do is refused before anything is loaded, by key, value and what is allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from actors.placement import NodeResources, plan_actors
from fedtailor.core.errors import ConfigError, PlacementError
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.compose import compose
from fedtailor.models.zero import deepspeed_config

TALK = ["task=cldr_instruct", "base=none", "methods=[lora]", "engine.zero.ranks=2"]


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        compose([], [*TALK, *overrides])
    return str(error.value)


def test_a_group_of_whole_processes_is_allowed() -> None:
    compose([], TALK)
    compose([], [*TALK, "engine.num_gpus=1", "engine.zero.offload=true"])
    compose([], [*TALK, "methods=[fedl2p]", "fedl2p.hypergradient.terms=0"])
    forms = ("pf2lora.order=finite_difference", "perfedavg_lora.order=hessian_free")
    compose([], [*TALK, "methods=[homlora,pf2lora,perfedavg_lora]", *forms])


def test_ranks_do_not_train_a_head_s_own_weights() -> None:
    words = ["base=none", "methods=[homlora]", "engine.zero.ranks=2"]
    with pytest.raises(ConfigError, match="homlora trains the classification head's own weights"):
        compose([], words)
    compose([], [*words, "homlora.head=frozen"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("methods=[fedl2p]", r"'methods': fedl2p needs second derivatives \(SECOND_ORDER\)"),
        ("methods=[pf2lora]", r"'methods': pf2lora needs second derivatives .*pf2lora.order=finite_difference"),
        ("methods=[perfedavg_lora]", r"perfedavg_lora needs second .* perfedavg_lora.order=hessian_free, works"),
        ("base=fedavg", "'base.name' = fedavg trains the base's own weights"),
        ("engine.num_gpus=0.5", r"'engine.num_gpus' = 0.5 \(allowed: 1, or 0 for CPUs\)"),
        ("engine.num_gpus=2", r"'engine.num_gpus' = 2 \(allowed: 1"),
        ("engine.memory_gb=8", r"'engine.memory_gb' = 8 shares GPUs \(allowed: engine.num_gpus=1"),
        ("engine.backend=serial", r"'engine.backend' = serial has one \(allowed: ray\)"),
        ("model.weights=4bit", "'model.weights': 4bit cannot be partitioned"),
        ("model.base_dropout=0.1", "'model.base_dropout' = 0.1: the ranks"),
        ("engine.zero.stage=2", r"'engine.zero.stage' = 2 .*\(allowed: 1, 3\)"),
        (
            "engine.zero={stage: 1, ranks: 2, offload: true}",
            "'engine.zero.offload' = true needs 'engine.zero.stage' = 3",
        ),
        ("engine.zero.offload=true", "'engine.zero.offload' = true moves the base"),
    ],
)
def test_what_ranks_cannot_do_is_refused(override: str, words: str) -> None:
    import re

    assert re.search(words, refused(override))


def test_every_broken_rule_is_named_at_once() -> None:
    text = refused("base=fedavg", "methods=[fedl2p]", "engine.num_gpus=0.5")
    assert len(text.splitlines()) == 3


GPUS = [NodeResources("a", cpus=16, gpus=4), NodeResources("b", cpus=16, gpus=2)]


def test_groups_are_counted_in_ranks_and_may_span_nodes() -> None:
    config = EngineConfig(num_gpus=1, zero={"ranks": 3})  # type: ignore[arg-type]
    plan = plan_actors(config, GPUS)
    assert (plan.count, plan.ranks, plan.capacity) == (2, 3, 2)


def test_more_ranks_than_gpus_are_refused() -> None:
    config = EngineConfig(num_gpus=1, zero={"ranks": 8})  # type: ignore[arg-type]
    with pytest.raises(PlacementError, match=r"1 group\(s\) of engine.zero.ranks=8 .* at most 6 processes do"):
        plan_actors(config, GPUS)


def test_the_file_for_scripts_of_one_s_own_says_what_the_platform_says() -> None:
    file = Path(__file__).parents[2] / "cluster/zero3.json"
    assert json.loads(file.read_text("utf-8")) == deepspeed_config(torch.bfloat16, 2, False)
