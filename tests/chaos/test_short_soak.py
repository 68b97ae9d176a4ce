"""The soak in small: every kind of fault once, on real processes, and every invariant checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import nodes
from scenarios import Injury, Scenario, draw, kinds_once
from soak import Soak

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    out: Path = tmp_path_factory.mktemp("soak")
    with nodes(2) as shared:
        yield Soak(out, shared.address)


@pytest.mark.parametrize("scenario", kinds_once(), ids=lambda s: "+".join(i.kind for i in s.injuries))
def test_whatever_breaks_the_run_ends_complete_and_equal_to_an_undisturbed_one(soak: Soak, scenario: Scenario) -> None:
    record = soak.run(scenario)
    assert record.violations == []
    assert record.exit_codes == [5] * len(scenario.of("F13")) + [0]
    assert len(record.recovery_s) == len(scenario.of("F1", "F2", "F13"))


def test_a_lost_node_s_work_is_done_elsewhere_and_the_loss_names_it(soak: Soak) -> None:
    record = soak.run(Scenario(10, (Injury(3, "F7"),)))
    assert (record.violations, record.exit_codes) == ([], [0])
    assert record.recovery_s


def test_the_soak_tells_a_result_that_differs(soak: Soak, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "_clean", {(): ("another", "another")})
    record = soak.run(Scenario(20, ()))
    assert record.violations == ["I4: the result differs from that of the undisturbed run"]


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
