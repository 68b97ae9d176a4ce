"""The protocol of PF2LoRA: all clients in every round, models scored over the rounds, committed with them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from tiny import run_tiny, tiny

from fedtailor.core.errors import ConfigError, Interrupted
from fedtailor.experiment.compose import compose
from fedtailor.experiment.plan import make_plan
from fedtailor.report.curves import training_curves
from fedtailor.storage.digest import digest, stage_digests
from fedtailor.storage.run_folder import RunFolder

RUN = (
    "methods=[pf2lora]", "base.name=none", "strategy.rounds=4", "strategy.cohort=all", "task.languages=[eng,yor]",
    "task.clients_per_language=2", "pf2lora.local_steps=2", "pf2lora.batch_size=8", "pf2lora.order=first",
    "pf2lora.lr=1e-2", "pf2lora.inner_lr=0.1",
)  # fmt: skip
SCORED = (*RUN, "strategy.evaluate_every=2")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny(tmp_path_factory.mktemp("scored"), *SCORED))


def rows(frame: pd.DataFrame, stage: str, metric: str) -> pd.DataFrame:
    return frame[(frame.stage == stage) & (frame.metric == metric)].set_index("client")[["round", "value", "weight"]]


def test_all_clients_are_in_every_round(run: RunFolder) -> None:
    trained = run.metrics("strategy")
    seen = trained[trained.metric == "train_loss"].groupby("round").client.nunique()
    assert seen.tolist() == [4] * 4


def test_models_are_scored_every_so_many_rounds_and_in_the_end_as_in_the_end(run: RunFolder) -> None:
    frame = run.metrics()
    for metric in ("loss", "accuracy"):
        over, last = rows(frame, "strategy", f"test_{metric}"), rows(frame, "personalise", metric)
        assert sorted(set(over["round"])) == [1, 3]
        final = over[over["round"] == 3].drop(columns="round")
        pd.testing.assert_frame_equal(final.sort_index(), last.drop(columns="round").sort_index(), check_exact=True)
        assert len(final) == 8, "unseen clients, too"
    first = rows(frame, "strategy", "test_loss")
    assert not first[first["round"] == 1].value.equals(first[first["round"] == 3].value)
    [figure] = [drawing for drawing in training_curves(frame) if "strategy" in drawing.name]
    assert "Test loss" in {axis.get_title() for axis in figure.figure.axes}


def test_scoring_changes_nothing_that_is_trained(run: RunFolder, tmp_path: Path) -> None:
    plain = run_tiny(tiny(tmp_path, *RUN))
    same = [rows(r.metrics(), "personalise", "loss").sort_index() for r in (run, plain)]
    pd.testing.assert_frame_equal(*same, check_exact=True)
    keys = [{stage["key"]: stage["artifact"] for stage in r.stages()} for r in (run, plain)]
    assert keys[0]["strategy/pf2lora/seed42"] != keys[1]["strategy/pf2lora/seed42"], "the commits hold other rows"
    assert len(stage_digests(plain.storage, "run")) == len(keys[1])


def test_a_run_that_is_stopped_while_it_scores_ends_as_if_undisturbed(run: RunFolder, tmp_path: Path) -> None:
    calls, exp = iter(range(1000)), tiny(tmp_path, *SCORED)
    with pytest.raises(Interrupted, match="personalise/pf2lora/seed42, round 1"):
        run_tiny(exp, should_stop=lambda: next(calls) >= 5)
    assert digest(run_tiny(exp).storage, "run") == digest(run.storage, "run")


def test_a_cohort_is_a_number_a_share_or_all() -> None:
    for word in ("strategy.cohort=al", "strategy.cohort=-1", "strategy.cohort=true"):
        with pytest.raises(ConfigError, match=r"'strategy\.cohort'.*(allowed: all|must be a number)"):
            compose([], [word])
    with pytest.raises(ConfigError, match=r"'strategy\.evaluate_every'.*greater than or equal to 0"):
        compose([], ["strategy.evaluate_every=-1"])


def test_a_plan_says_that_scoring_over_the_rounds_is_not_counted() -> None:
    words = ["task=cldr", "model=tiny-bert", "base=none", "methods=[homlora]", "strategy.cohort=all"]
    notes = [make_plan(compose([], [*words, *more])).notes for more in ([], ["strategy.evaluate_every=5"])]
    assert [note for note in notes[1] if note not in notes[0]] == [
        "Models are scored after every 5 rounds ('strategy.evaluate_every'), which is not counted."
    ]
