"""A run on questions and contexts keeps every promise that a run on texts keeps; its report says what it must."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from squad_case import SPANS, squad_tree, write_squad
from tiny import run_tiny

from fedtailor.core.errors import ConfigError, Interrupted
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.plan import make_plan
from fedtailor.personalise.trained import open_method
from fedtailor.report import report_of
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

MEASURES = {"exact_match", "f1", "no_answer", "loss"}


def experiment(storage: Path, *more: str, tree: Any = None) -> ExperimentBase:
    path = write_squad(storage / "squad" / "train-v2.0.json.gz", tree)
    return compose([], [*SPANS, f"task.path={path}", f"storage={storage}", *more])


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    storage = tmp_path_factory.mktemp("clean")
    return run_tiny(
        experiment(storage, "personalise.score_train=true", "base.name=fedavg", "base.rounds=2", "base.cohort=4")
    )


def scores(run: RunFolder) -> pd.DataFrame:
    frame = run.metrics("personalise")
    return frame[frame.module == ""]


def test_every_client_is_scored_on_its_questions(clean: RunFolder) -> None:
    found = scores(clean)
    assert set(found.metric) >= MEASURES | {"train_loss_after"}
    assert "train_accuracy" not in set(found.metric)
    assert found[found.metric.isin(MEASURES - {"loss"})].value.between(0, 1).all()
    once = found[(found.method == "base") & (found.metric != "train_loss_after")].pivot(
        index="client", columns="metric", values="weight"
    )
    assert (once["f1"] == once["exact_match"]).all()
    assert (once["loss"] >= once["f1"]).all(), "a question has a window or more"
    assert once["f1"].sum() == round(0.2 * 51)


def test_personal_training_lowers_the_loss(clean: RunFolder) -> None:
    loss = scores(clean).query("metric == 'loss'").groupby("method").value.mean()
    assert loss["lora"] < loss["base"]


def test_interrupted_and_resumed_is_uninterrupted(clean: RunFolder, tmp_path: Path) -> None:
    calls = iter(range(10_000))
    exp = experiment(tmp_path, "personalise.score_train=true", "base.name=fedavg", "base.rounds=2", "base.cohort=4")
    with pytest.raises(Interrupted):
        run_tiny(exp, should_stop=lambda: next(calls) >= 3)
    assert digest(run_tiny(exp).storage, "run") == digest(clean.storage, clean.run_id)


def test_the_report_has_both_measures_and_the_score_of_no_answer(clean: RunFolder, tmp_path: Path) -> None:
    report_of(clean, tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "results.csv")
    assert {"exact_match", "f1", "loss"} <= set(table.metric)
    text = (tmp_path / "report" / "metrics_seen.md").read_text("utf-8")
    found = scores(clean).query("metric == 'no_answer' and method == 'base'")
    share = (found.value * found.weight).sum() / found.weight.sum()
    assert f"Answering no question at all scores {100 * share:.2f} in both exact match and F1." in text
    assert "Exact match / F1, in this order, in percent" in text
    assert "is sorted by title" in text
    assert "squad2" in (tmp_path / "report" / "table_seen.md").read_text("utf-8")


def test_v1_has_no_null_and_a_plan_names_what_was_dropped(tmp_path: Path) -> None:
    tree = squad_tree()
    entry = next(e for part in tree["data"][0]["paragraphs"] for e in part["qas"] if e["answers"])
    entry["answers"][0]["text"] = "nowhere"
    exp = experiment(tmp_path, "task.subset=v1", "methods=[base]", tree=tree)
    plan = make_plan(exp)
    assert any(f"1, {exp.task.path}, question {entry['id']}" in note for note in plan.notes)
    found = scores(run_tiny(exp))
    assert set(found.metric) == MEASURES - {"no_answer"}
    with pytest.raises(ConfigError, match=r"marks spans.*no client can join"):
        open_method(RunFolder.open(Storage(exp.storage), "run"))
