"""The soak's own rules: a seed always draws the same, and what has struck does not strike again."""

from __future__ import annotations

from scenarios import Injury, Scenario, draw


def test_a_seed_always_draws_the_same_injuries_and_every_kind_occurs() -> None:
    scenarios = [draw(seed) for seed in range(200)]
    assert scenarios == [draw(seed) for seed in range(200)]
    assert {i.kind for s in scenarios for i in s.injuries} == {"F1", "F2", "F7", "F13", "F15"}
    for scenario in scenarios:
        rounds = [i.round for i in scenario.injuries]
        assert 1 <= len(set(rounds)) == len(rounds) <= 3
    assert 10 <= sum(bool(s.of("F7")) for s in scenarios) <= 30


def test_a_plan_forgets_what_has_struck() -> None:
    scenario = Scenario(1, (Injury(2, "F1", 0, 1), Injury(3, "F13", 0, 2), Injury(6, "F2", 1)))
    assert scenario.plan(0) == (
        "kill stage=base round=2 segment=0 step=1; enospc:commit:before-record@4; "
        "kill-after stage=base round=6 segment=1"
    )
    left = scenario.after_full_disk(scenario.injuries[1])
    assert left.plan(3) == "kill-after stage=base round=6 segment=1"
    assert left.plan(7) is None
