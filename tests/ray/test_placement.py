from __future__ import annotations

import pytest

from actors.placement import NodeResources, plan_actors
from fedtailor.core.errors import PlacementError
from fedtailor.core.settings import EngineConfig

LAPTOP = [NodeResources("laptop", cpus=2)]
A100 = NodeResources("gpu-1", cpus=16, gpus=2, gpu_memory_gb=85.0)
T4 = NodeResources("gpu-2", cpus=8, gpus=1, gpu_memory_gb=16.0)


@pytest.mark.parametrize(("cpus", "count"), [(1, 1), (2, 2), (8, 8), (64, 8)])
def test_without_gpu_there_is_one_actor_per_cpu_up_to_eight(cpus: int, count: int) -> None:
    plan = plan_actors(EngineConfig(), [NodeResources("host", cpus=cpus)])
    assert (plan.count, plan.capacity, plan.num_gpus, plan.memory_fraction) == (count, cpus, 0.0, None)


@pytest.mark.parametrize(
    ("num_gpus", "count", "fraction"), [(0.25, 12, 0.25), (0.5, 6, 0.5), (1, 3, None), (2, 1, None)]
)
def test_with_gpus_there_is_one_actor_per_share_and_none_spans_two_cards(
    num_gpus: float, count: int, fraction: float | None
) -> None:
    plan = plan_actors(EngineConfig(num_gpus=num_gpus), [A100, T4])
    assert (plan.count, plan.memory_fraction) == (count, fraction)


def test_a_fraction_that_leaves_a_rest_wastes_it_rather_than_straddle() -> None:
    assert plan_actors(EngineConfig(num_gpus=0.4), [A100]).count == 4


def test_memory_gb_becomes_one_kth_of_the_smallest_card() -> None:
    plan = plan_actors(EngineConfig(memory_gb=20), [A100])
    assert (plan.num_gpus, plan.memory_fraction, plan.count) == (0.25, 0.25, 8)
    assert plan_actors(EngineConfig(memory_gb=5), [A100, T4]).memory_fraction == pytest.approx(1 / 3)


def test_thirds_of_a_card_add_up_to_three_actors_in_ray_s_steps() -> None:
    plan = plan_actors(EngineConfig(memory_gb=5), [T4])
    assert (plan.num_gpus, plan.count) == (0.3333, 3)


def test_memory_gb_that_needs_a_whole_card_is_not_capped() -> None:
    plan = plan_actors(EngineConfig(memory_gb=50), [A100])
    assert (plan.num_gpus, plan.memory_fraction, plan.count) == (1.0, None, 2)


def test_cpus_limit_gpu_shares_too() -> None:
    assert plan_actors(EngineConfig(num_gpus=0.1, num_cpus=4), [A100]).count == 4


def test_bundles_of_a_placement_group_may_hold_a_fraction_of_a_card() -> None:
    bundles = [NodeResources("bundle 0", cpus=0)] + [NodeResources(f"bundle {i}", 1, 0.25) for i in (1, 2)]
    assert plan_actors(EngineConfig(num_gpus=0.25), bundles).count == 2


def test_fractional_cpus_let_three_actors_share_two() -> None:
    assert plan_actors(EngineConfig(actors=3, num_cpus=0.5), LAPTOP).count == 3


@pytest.mark.parametrize(
    ("config", "nodes", "words"),
    [
        (
            EngineConfig(actors=3),
            LAPTOP,
            ["3 actors of 1 CPU", "at most 2", "laptop has 2 CPU", "engine.actors"],
        ),
        (
            EngineConfig(num_gpus=0.5),
            LAPTOP,
            ["0.5 GPU", "at most 0", "laptop has 2 CPU, 0 GPU", "engine.num_gpus"],
        ),
        (EngineConfig(num_gpus=3), [A100], ["3 GPU", "gpu-1 has 16 CPU, 2 GPU of 85.0 GB (0 fit)"]),
        (EngineConfig(actors=9, num_gpus=0.25), [A100], ["9 actors", "at most 8", "(8 fit)"]),
        (
            EngineConfig(memory_gb=20),
            LAPTOP,
            ["engine.memory_gb=20", "needs a GPU", "laptop has 2 CPU, 0 GPU"],
        ),
        (EngineConfig(memory_gb=100), [A100], ["engine.memory_gb=100", "85.0 GB"]),
        (EngineConfig(memory_gb=20), [A100, T4], ["engine.memory_gb=20", "16.0 GB"]),
        (EngineConfig(memory_gb=20), [NodeResources("x", 8, 1)], ["GPU memory of x", "engine.num_gpus"]),
        (EngineConfig(), [], ["no node is alive"]),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value.model_dump(exclude_defaults=True)),
)
def test_what_can_never_fit_is_refused_with_the_numbers(
    config: EngineConfig, nodes: list[NodeResources], words: list[str]
) -> None:
    with pytest.raises(PlacementError) as refusal:
        plan_actors(config, nodes)
    for word in words:
        assert word in str(refusal.value)


def test_a_long_list_of_nodes_is_cut() -> None:
    with pytest.raises(PlacementError, match="and 92 more"):
        plan_actors(EngineConfig(num_gpus=1), [NodeResources(f"n{i}", 4) for i in range(100)])


def test_per_client_mode_asks_for_the_cohort_and_says_so() -> None:
    with pytest.raises(PlacementError, match=r"40 actors .* at most 2 .* Lower the cohort \(or use engine.mode=pool\)"):
        plan_actors(EngineConfig(mode="per_client"), LAPTOP, count=40)
