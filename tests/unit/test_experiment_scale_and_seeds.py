"""One knob for small machines, and whose seed makes the base."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import run_tiny, tiny

from fedtailor.core.errors import ConfigError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import overrides_of, scaled_task
from fedtailor.experiment.stages import Inputs, plan_stages

INPUTS = Inputs("data-1", "model-1", "tokens-1")


def stages(*overrides: str, seed: int = 42) -> dict[str, object]:
    exp = compose(["masakhanews_fedp2eft"], list(overrides))
    return {stage.key: stage for stage in plan_stages(exp, seed, INPUTS, 160)}


def test_scale_shrinks_rounds_and_clients_and_leaves_the_share_of_the_cohort() -> None:
    found = stages("scale=0.1")
    assert (found["base/seed42"].rounds, found["base/seed42"].cohort) == (10, 16)
    assert found["strategy/fedp2eft/seed42"].rounds == 15
    assert scaled_task(compose(["masakhanews_fedp2eft"], ["scale=0.25"])).clients_kept == 2


def test_scale_is_named_where_overrides_are() -> None:
    exp = compose(["masakhanews_fedp2eft"], ["scale=0.1"])
    assert {"key": "scale", "default": 1.0, "value": 0.1} in overrides_of(exp)


@pytest.mark.parametrize("value", ["0", "1.5", "-1"])
def test_a_scale_outside_0_to_1_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="scale"):
        compose(["demo"], [f"scale={value}"])


def test_a_seed_list_with_repeats_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'seeds'.*repeats|seeds.*has repeats"):
        compose(["demo"], ["seeds=[42,52,42]"])


def test_every_seed_has_its_own_base_unless_one_is_shared() -> None:
    own = [stages(seed=seed)[f"base/seed{seed}"].artifact for seed in (42, 52)]
    assert len(set(own)) == 2
    shared = [stages("base.seed=42", seed=seed)["base/seed42"].artifact for seed in (42, 52)]
    assert shared == [own[0], own[0]]
    strategies = {stages("base.seed=42", seed=s)[f"strategy/fedp2eft/seed{s}"].artifact for s in (42, 52)}
    assert len(strategies) == 2, "methods still follow the run's seeds"


def test_a_shared_base_is_trained_once(tmp_path: Path) -> None:
    run = run_tiny(tiny(tmp_path, "methods=[lora]", "budgets=[1]", "seeds=[42,52]", "base.seed=7", "base.rounds=1"))
    assert [s["key"] for s in run.stages()] == ["base/seed7", "personalise/lora/seed42", "personalise/lora/seed52"]
    frame = run.metrics("personalise")
    assert set(frame["seed"]) == {42, 52}
    per_seed = frame[frame["metric"] == "loss"].set_index("client").groupby("seed")["value"]
    first, second = (values for _, values in per_seed)
    assert set(first.index) == set(second.index), "one partition"
    assert not first.equals(second), "another LoRA initialisation and data order"
