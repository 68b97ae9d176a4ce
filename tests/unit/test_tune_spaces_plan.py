"""A sweep before any process is started, and what is made of its trials when they are over."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from matplotlib.image import imread
from tiny import TINY, run_tiny, tiny

from fedtailor.core.config import flatten
from fedtailor.core.errors import ConfigError, DataError, Interrupted, StorageError
from fedtailor.core.messages import metric_row
from fedtailor.experiment.compose import compose, load_preset
from fedtailor.experiment.config import to_json
from fedtailor.experiment.launch import default_run_id
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from tune_spaces.figure import draw
from tune_spaces.grid import OBJECTIVES, Grid, score
from tune_spaces.launch import TuneSignals
from tune_spaces.plan import SweepPlan, make_plan, steps_of
from tune_spaces.results import Outcome, Trial, begin_record, best_preset, examine, refuse_other, settled

WORDS = [word for word in TINY if not word.startswith(("methods=", "budgets=", "r_max=", "lora."))]
LAMBDA = "fedp2eft.stage1.lambda_lr"


def planned(address: str = "fedp2eft/lambda_lr", *more: str, **options: Any) -> SweepPlan:
    return make_plan(address, [*WORDS, *more], **options)


def finished(plan: SweepPlan, *values: float | None) -> Outcome:
    numbers = range(len(plan.trials))
    found = [*values, *([None] * (len(plan.trials) - len(values)))]
    trials = [
        Trial(n, plan.run_id(n), plan.trials[n], "stopped" if found[n] is None else "complete", found[n])
        for n in numbers
    ]
    return Outcome(plan, trials, reference=0.2)


def test_trials_are_all_combinations_and_each_sets_its_own_values_and_nothing_else() -> None:
    plan = planned("fedp2eft/lora")
    assert len(plan.trials) == 9
    common = flatten(plan.base()) | {"methods": ("lora",)}
    for number, values in enumerate(plan.trials):
        assert flatten(plan.experiment(number)) == common | values
        assert plan.number({**values, "more": 1}) == number


def test_the_searched_method_runs_alone_at_the_largest_budget_on_the_clients_that_count() -> None:
    exp = planned("fedp2eft/lora").experiment(0)
    assert (exp.methods, exp.budgets, exp.personalise.pools) == (("lora",), (16,), ("seen",))
    assert exp.personalise.score_train
    unseen = planned("fedp2eft/lora", objective_name="unseen_accuracy").experiment(0)
    assert unseen.personalise.pools == ("unseen",)
    assert not unseen.personalise.score_train


def test_budgets_that_are_typed_are_kept() -> None:
    assert planned("fedp2eft/lora", "budgets=[1,2]").experiment(3).budgets == (1, 2)


def test_the_same_words_give_the_same_name_and_other_words_another(tmp_path: Path) -> None:
    one = planned()
    assert planned().sweep_id == one.sweep_id
    assert planned("fedp2eft/lambda_lr", f"storage={tmp_path}", "wandb.mode=offline").sweep_id == one.sweep_id
    others = [
        planned("fedp2eft/lambda_lr", "strategy.rounds=2"),
        planned(objective_name="seen_loss"),
        planned(asha=True),
    ]
    assert len({plan.sweep_id for plan in [one, *others]}) == 4


def test_trials_are_one_group_of_weights_and_biases_unless_the_user_has_another() -> None:
    plan = planned(sweep_id="s")
    assert plan.experiment(0).wandb.group == "s"
    assert plan.run_id(3) == "s-03"
    assert planned("fedp2eft/lambda_lr", "wandb.group=mine", sweep_id="s").experiment(0).wandb.group == "mine"


@pytest.mark.parametrize(
    ("address", "words", "options", "told"),
    [
        ("fedp2eft/lamda_lr", [], {}, "unknown sweep 'fedp2eft/lamda_lr'; did you mean 'fedp2eft/lambda_lr'"),
        ("nonsense", [], {}, "known: fedp2eft/lora, fedp2eft/adalora"),
        ("fedp2eft/lora", [], {"objective_name": "train_acuracy"}, "did you mean 'train_accuracy'"),
        ("fedp2eft/lora", ["lora.lr=1e-3"], {}, "'lora.lr': is searched by fedp2eft/lora"),
        ("fedp2eft/lora", ["methods=[lora]"], {}, "'methods': fedp2eft/lora runs 'lora' alone"),
        ("fedp2eft/lora", ["personalise.pools=[unseen]"], {}, "needs the seen clients"),
        ("fedp2eft/lora", ["lora.epoch=1"], {}, "did you mean 'epochs'"),
    ],
)
def test_what_cannot_be_searched_is_refused_with_what_can(
    address: str, words: list[str], options: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        make_plan(address, words, **options)


def test_rounds_that_end_early_do_not_move_the_steps_after_them() -> None:
    stages = [
        {"key": key, "kind": key.split("/")[0], "rounds": rounds}
        for key, rounds in [("base/s", 9), ("strategy/m/1", 5), ("personalise/m/1", 0), ("strategy/m/2", 5)]
    ]
    assert steps_of(stages, chunks=3) == {"strategy/m/1": (0, 5), "personalise/m/1": (5, 3), "strategy/m/2": (8, 5)}


def rows(*found: tuple[str, str, int, str, float, float]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            metric_row(
                stage="personalise", method="lora", pool="seen", language=language, client=client, budget=budget,
                metric=metric, value=value, weight=weight,
            )
            for language, client, budget, metric, value, weight in found
        ]
    )  # fmt: skip


def test_the_objective_pools_a_language_by_examples_then_weighs_languages_and_budgets_alike() -> None:
    frame = rows(
        ("a", "a0", 2, "train_accuracy", 1.0, 30), ("a", "a1", 2, "train_accuracy", 0.0, 10),
        ("b", "b0", 2, "train_accuracy", 0.25, 1000),
        ("a", "a0", 4, "train_accuracy", 0.5, 40), ("b", "b0", 4, "train_accuracy", 0.5, 1000),
        ("a", "a0", 2, "accuracy", 0.9, 30),
    )  # fmt: skip
    assert score(frame, "lora", OBJECTIVES["train_accuracy"]) == pytest.approx(((0.75 + 0.25) / 2 + 0.5) / 2)
    with pytest.raises(DataError, match="no unseen client of 'lora' has the metric 'accuracy'"):
        score(frame, "lora", OBJECTIVES["unseen_accuracy"])


def test_a_loss_is_better_when_it_is_smaller() -> None:
    plan = planned(objective_name="train_loss")
    assert finished(plan, 0.4, 0.2, 0.3).best == finished(plan, 0.4, 0.2, 0.3).trials[1]


def test_of_equal_trials_the_papers_choice_is_the_best_and_a_flat_grid_is_told() -> None:
    plan = planned()
    assert finished(plan, 0.5, 0.5, 0.5, 0.5).best == finished(plan, 0.5, 0.5, 0.5, 0.5).trials[1]
    assert finished(plan, 0.5, 0.4, 0.5).best == finished(plan, 0.5, 0.4, 0.5).trials[0]
    assert finished(plan, 0.5, 0.5).flat
    assert not finished(plan, 0.5, 0.4).flat


def test_the_best_values_are_a_preset_that_any_configuration_can_take(tmp_path: Path) -> None:
    plan = planned("fedp2eft/lora")
    text = best_preset(plan, plan.trials[3], 0.4)
    (tmp_path / "best.yaml").write_text(text)
    assert yaml.safe_load(text) == {"lora": {"lr": 1e-4, "epochs": 1}}
    exp = compose(["demo", str(tmp_path / "best.yaml")], ["methods=[lora]"])
    assert exp.lora.lr == 1e-4  # type: ignore[attr-defined]
    assert default_run_id(["demo", str(tmp_path / "best.yaml")], exp).startswith("demo-best-")


@pytest.mark.parametrize("value", [1e-5, 1e-4, 0.1, 1.0, 3e-7, 0.123456789012345, 2e10])
def test_a_rate_survives_the_preset_file_whatever_its_size(value: float) -> None:
    plan = planned("fedp2eft/lambda_lr")
    one = SweepPlan("s", plan.address, Grid("fedp2eft", {LAMBDA: (value,)}, plan.objective, ""), *_rest(plan))
    read = yaml.safe_load(best_preset(one, one.trials[0], 0.5))
    assert read == {"fedp2eft": {"stage1": {"lambda_lr": value}}}


def _rest(plan: SweepPlan) -> tuple[str, bool, tuple[str, ...], Any]:
    return plan.objective, plan.asha, plan.words, plan.config


@pytest.mark.parametrize(
    ("content", "told"), [(None, "No such file"), ("- a\n", "is not a tree of keys"), ("a: [", "cannot read")]
)
def test_a_preset_file_that_is_none_is_refused_by_its_name(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "mine.yaml"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=rf"{file}.*{told}|{told}.*{file}"):
        load_preset(str(file))


def test_a_name_that_belongs_to_another_search_is_refused_and_says_in_what_it_differs(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    plan = planned(sweep_id="mine")
    begin_record(storage, plan)
    refuse_other(storage, planned(sweep_id="mine"))
    with pytest.raises(StorageError, match=r"differs in objective, config\)"):
        refuse_other(storage, planned(sweep_id="mine", objective_name="unseen_loss"))
    (tmp_path / "other").mkdir()
    with pytest.raises(StorageError, match="exists and is no sweep"):
        refuse_other(storage, planned(sweep_id="other"))


def test_the_record_names_every_trial_and_a_sweep_is_settled_only_when_none_is_left(tmp_path: Path) -> None:
    storage, plan = Storage(str(tmp_path)), planned(sweep_id="mine")
    begin_record(storage, plan)
    content = json.loads((tmp_path / "mine/sweep.json").read_text())
    assert [trial["state"] for trial in content["trials"]] == ["unfinished"] * 4
    assert content["identity"]["space"] == {LAMBDA: [0.1, 0.01, 0.001, 0.0001]}
    assert settled(storage, plan) is None
    outcome = examine(storage, plan, [], {2: "boom"})
    assert [trial.state for trial in outcome.trials] == ["unfinished", "unfinished", "failed", "unfinished"]
    assert outcome.trials[2].message == "boom"


@pytest.mark.parametrize("address", ["fedp2eft/lambda_lr", "fedp2eft/lora", "fedp2eft/adalora"])
def test_grids_of_one_two_and_three_keys_are_drawn(address: str, tmp_path: Path) -> None:
    plan = planned(address)
    values = [0.3 + 0.4 * n / len(plan.trials) for n in range(len(plan.trials) - 1)]
    png, svg = draw(finished(plan, *values), tmp_path)
    assert imread(png).std() > 0.02
    assert "<svg" in svg.read_text()


def test_scoring_the_train_split_adds_its_rows_and_changes_no_other(tmp_path: Path) -> None:
    only = ("methods=[base,lora,fedp2eft]", "strategy.rounds=1", "base.rounds=1", "personalise.pools=[seen]")
    plain = run_tiny(tiny(tmp_path, *only), "plain").metrics()
    scored = run_tiny(tiny(tmp_path, *only, "personalise.score_train=true"), "scored").metrics()
    new = scored[scored["metric"].isin(["train_accuracy", "train_loss_after"])]
    assert scored.drop(index=new.index).reset_index(drop=True).equals(plain)
    assert set(new["method"]) == {"base", "lora", "fedp2eft"}
    counted = new.groupby(["method", "budget", "client"])["metric"].nunique()
    assert (counted == 2).all()
    assert len(counted) == 9 * (1 + 2 + 2)
    frame = new[new["metric"] == "train_accuracy"]
    assert ((frame["value"] * frame["weight"]).round(6) % 1).abs().max() < 1e-5  # whole texts are right or wrong


def test_a_model_scored_on_what_it_was_trained_on_gets_better_there(tmp_path: Path) -> None:
    hard = ("methods=[base,lora]", "lora.epochs=30", "base.rounds=1", "personalise.pools=[seen]")
    metrics = run_tiny(tiny(tmp_path, *hard, "personalise.score_train=true")).metrics("personalise")
    loss = OBJECTIVES["train_loss"]
    assert score(metrics, "lora", loss) < 0.8 * score(metrics, "base", loss)


def test_a_trial_that_was_stopped_on_purpose_is_marked_and_has_no_value(tmp_path: Path) -> None:
    storage, plan = Storage(str(tmp_path)), planned("fedp2eft/lambda_lr", f"storage={tmp_path}", sweep_id="mine")
    exp = plan.experiment(1)
    run = RunFolder.create(storage, plan.run_id(1), to_json(exp))
    outcome = examine(storage, plan, [1], {})
    assert (outcome.trials[1].state, outcome.trials[1].value) == ("stopped", None)
    assert run.status()["state"] == "interrupted"
    assert "ASHA" in run.status()["message"]
    assert outcome.best is None


def test_a_run_left_running_by_a_killed_sweep_is_brought_in_step(tmp_path: Path) -> None:
    storage, plan = Storage(str(tmp_path)), planned("fedp2eft/lambda_lr", f"storage={tmp_path}", sweep_id="mine")
    run = RunFolder.create(storage, plan.run_id(0), to_json(plan.experiment(0)))
    assert examine(storage, plan, [], {}).trials[0].state == "unfinished"
    assert run.status()["state"] == "interrupted"


@pytest.fixture
def listening() -> Iterator[list[int]]:
    heard: list[int] = []
    before = signal.getsignal(signal.SIGUSR1)
    yield heard
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_first_signal_asks_tune_to_end_and_a_second_ends_at_once(
    listening: list[int], sent: signal.Signals, code: int
) -> None:
    before, told = signal.getsignal(sent), []
    with TuneSignals(told.append) as signals:
        signal.signal(signal.SIGUSR1, lambda number, _: listening.append(number))  # as Tune does
        signals.check()
        signal.raise_signal(sent)
        assert listening == [signal.SIGUSR1]
        assert len(told) == 1
        with pytest.raises(Interrupted) as error:
            signals.check()
        assert error.value.exit_code == code
        with pytest.raises(Interrupted, match="at once"):
            signal.raise_signal(sent)
    assert signal.getsignal(sent) == before


def test_a_signal_before_tune_listens_ends_at_once() -> None:
    with TuneSignals(lambda _: None), pytest.raises(Interrupted) as error:
        signal.raise_signal(signal.SIGTERM)
    assert error.value.exit_code == 143


def test_the_command_line_lists_the_grids_and_names_them_where_one_is_unknown() -> None:
    from typer.testing import CliRunner

    from fedtailor.cli import app

    listed = CliRunner().invoke(app, ["list", "sweeps"])
    assert listed.exit_code == 0
    assert "fedp2eft/adalora" in listed.output
    wrong = CliRunner().invoke(app, ["sweep", "fedp2eft/lambda"])
    assert wrong.exit_code == 2
    assert "fedp2eft/lambda_lr" in wrong.output
