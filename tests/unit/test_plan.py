"""Plans come from sizes alone, and say what they do not know."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from rich.console import Console

from fedtailor.runs.artifacts import Artifacts
from fedtailor.runs.experiment import compose
from fedtailor.runs.inputs import make_inputs
from fedtailor.runs.plan import Plan, make_plan
from fedtailor.runs.plan_view import duration, show_plan, size
from fedtailor.runs.stages import plan_stages
from fedtailor.runs.storage import Storage

SMALL = ("task.languages=[swa,yor]", "task.clients_per_language=3", "base.cohort=3", "strategy.cohort=2")


def shown(plan: Plan) -> str:
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show_plan(console, plan)
    return console.export_text()


@pytest.fixture(scope="module")
def paper() -> Plan:
    """The paper's experiment without data and without weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FEDTAILOR_DATA", raising=False)
        patch.setattr("fedtailor.runs.plan.try_to_load_from_cache", lambda *_, **__: None)
        return make_plan(compose(["masakhanews_fedp2eft"], ["storage=/nonexistent/runs"]))


def test_the_papers_sizes_follow_from_mberts_dimensions(paper: Plan) -> None:
    generator = paper.sizes["fedp2eft"].generators[0]
    assert paper.model.layers == 74
    assert generator.widths == (148, 296, 2368)
    assert generator.parameters == 747_401
    assert paper.sizes["fedp2eft"].shared == 747_401
    assert paper.sizes["fedavg"].shared == paper.model.parameters


def test_bytes_per_round_are_what_is_shared_times_the_cohort(paper: Plan) -> None:
    costs = {row.stage.key: row.estimate for row in paper.stages}
    assert costs["strategy/fedp2eft/seed42"].down == 747_401 * 4 * 16
    assert costs["base/seed42"].up == paper.model.parameters * 4 * 16
    assert costs["personalise/lora/seed42"].down == 0


def test_the_whole_matrix_is_planned(paper: Plan) -> None:
    keys = [row.stage.key for row in paper.stages]
    assert len(keys) == len(set(keys)) == 3 * 7
    updates = {row.stage.key: row.estimate.updates for row in paper.stages}
    assert updates["base/seed52"] == 100 * 16
    assert updates["strategy/fedp2eft/seed62"] == 150 * 16
    assert updates["personalise/fedp2eft/seed42"] == 320


def test_memory_counts_weights_and_adam_states_of_all_lanes(paper: Plan) -> None:
    costs = {row.stage.key: row.estimate for row in paper.stages}
    assert costs["base/seed42"].weights == paper.model.parameters * 4
    assert costs["base/seed42"].trained == paper.model.parameters * 16
    assert costs["personalise/lora/seed42"].trained == paper.model.adapter_parameters(16) * 16 * 4
    assert costs["personalise/base/seed42"].memory == paper.model.parameters * 4


def test_what_is_unknown_is_said(paper: Plan) -> None:
    text = shown(paper)
    assert "client sizes are unknown" in text
    assert "sizes unknown" in text
    assert all(row.there is None for row in paper.stages)
    assert all(row.estimate.flops is None for row in paper.stages)
    assert "unknown without weights" in text


def test_the_view_shows_the_numbers(paper: Plan) -> None:
    text = shown(paper)
    assert "L = 74 adapted linear layers" in text
    assert "148-296-2368 with 747,401 parameters" in text
    assert "47.8 MB" in text
    assert "160 seen and 160 unseen clients" in text


def test_artifact_names_are_those_that_a_run_would_use(tmp_path: Path) -> None:
    exp = compose(["demo"], [*SMALL, f"storage={tmp_path}"])
    plan = make_plan(exp)
    inputs = make_inputs(exp, 42, Artifacts(Storage(tmp_path), "test"))
    expected = [stage.artifact for stage in plan_stages(exp, 42, inputs, 6)]
    assert [row.stage.artifact for row in plan.stages] == expected
    assert [row.there for row in plan.stages] == [False] * len(expected)


def test_artifacts_that_are_complete_are_recognised_and_nothing_is_written(tmp_path: Path) -> None:
    exp = compose(["demo"], [*SMALL, f"storage={tmp_path}"])
    first = make_plan(exp).stages[0].stage
    assert list(tmp_path.iterdir()) == []
    done = tmp_path / "artifacts" / first.artifact / "DONE.json"
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    again = make_plan(exp)
    assert [row.there for row in again.stages] == [True] + [False] * (len(again.stages) - 1)
    assert "yes" in shown(again)


@pytest.mark.data
def test_real_data_give_sizes_and_work(tmp_path: Path) -> None:
    if not os.environ.get("FEDTAILOR_DATA"):
        pytest.skip("set FEDTAILOR_DATA to a folder that holds masakhanews/ to plan with the real news texts")
    words = [
        "task.languages=[swa]",
        "base.cohort=2",
        "strategy.cohort=2",
        f"storage={tmp_path}",
        "seeds=[42]",
    ]
    plan = make_plan(compose(["masakhanews_fedp2eft"], words))
    assert plan.population.largest >= plan.population.middle >= plan.population.smallest >= 2
    assert plan.population.classes == 7
    assert all(row.estimate.flops for row in plan.stages if row.stage.method != "majority")


def test_numbers_are_shown_for_people() -> None:
    assert [size(n) for n in (12, 2_850, 747_401 * 4, 11.4e9, 2e12)] == [
        "12 B",
        "2.85 kB",
        "2.99 MB",
        "11.4 GB",
        "2 TB",
    ]
    assert [duration(s) for s in (12, 240, 36_000)] == ["12 s", "4 min", "10.0 h"]
