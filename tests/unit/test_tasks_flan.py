"""FedDPA's data sets of Flan: from files to clients, which answers are labels and how these are scored."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import run_tiny, talk

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.evaluation.text_metrics import label_match
from fedtailor.report.scores import answer_measures, checked, scored_rows
from fedtailor.tasks import flan
from fedtailor.tasks.flan import SUBSETS, label_answers
from fedtailor.tasks.source import Example
from fedtailor.tasks.task import TaskData, prepare, task_config

needs_data = pytest.mark.skipif(
    not (os.environ.get("FEDTAILOR_DATA") and Path(os.environ["FEDTAILOR_DATA"], "flan_feddpa").is_dir()),
    reason="set FEDTAILOR_DATA to a folder that holds flan_feddpa/ to test with it",
)

TASKS = ("snli", "cola", "fix_punct")
ANSWERS = {"snli": ("yes", "no"), "cola": ("acceptable", "unacceptable")}


def rows(task: str, count: int, split: str) -> list[dict[str, str]]:
    answers = ANSWERS.get(task)
    return [
        {
            "instruction": f"{split} question {k} of {task}?",
            "output": answers[k % 2] if answers else f"A text of {k} words.",
            "task": task,
            "category": "any",
        }
        for k in range(count)
    ]


def write(
    folder: Path, tasks: Sequence[str] = TASKS, tests: Sequence[str] = TASKS, subset: str = "dataset1", gz: bool = False
) -> Path:
    """A data set as FedDPA's repository has it: a file of each task's training rows, one of all test rows."""
    made = folder / subset
    (made / "8").mkdir(parents=True)
    files = {f"8/local_training_{SUBSETS[subset].index(t)}.json": json.dumps(rows(t, 20, "train")) for t in tasks}
    lines = [json.dumps(row) + "\n" for task in tests for row in rows(task, 10, "test")]
    for name, text in {**files, "flan_test_200_selected_nstrict_1.jsonl": "".join(lines)}.items():
        content = text.encode()
        (made / f"{name}{'.gz' * gz}").write_bytes(gzip.compress(content) if gz else content)
    return folder


def made(folder: Path, **keys: Any) -> TaskData:
    given: Mapping[str, Any] = {"path": str(folder), "clients_per_language": 3, **keys}
    return prepare(task_config("flan", **given), 42, folder / "out")


def counts(data: TaskData, split: str) -> np.ndarray:
    return np.array([client[f"{split}_classes"] for client in data.manifest["clients"]])


@pytest.mark.parametrize("gz", [False, True], ids=["plain", "gzipped"])
def test_a_client_has_the_rows_of_one_task_alone(gz: bool, tmp_path: Path) -> None:
    data = made(write(tmp_path, gz=gz))
    assert data.labels == TASKS
    assert counts(data, "train").tolist() == np.diag([20] * 3).tolist()
    assert counts(data, "test").tolist() == np.diag([10] * 3).tolist()
    texts, _ = data.texts("seen/dataset1/01", "test")
    assert sorted(texts) == sorted(f"test question {k} of cola?" for k in range(10))
    assert set(data.pairs("seen/dataset1/01", "train") or ()) == {"acceptable", "unacceptable"}


def test_dirichlet_clients_share_all_tasks_and_the_same_test_rows(tmp_path: Path) -> None:
    data = made(write(tmp_path), dealing="dirichlet", clients_per_language=4, min_size=4)
    assert counts(data, "train").sum(0).tolist() == [20] * 3
    assert counts(data, "test").sum(0).tolist() == [10] * 3
    assert ((counts(data, "train") > 0).sum(1) > 1).any()
    assert data.manifest["notes"]["smallest_client"] >= 4


def test_few_different_responses_are_labels(tmp_path: Path) -> None:
    data = made(write(tmp_path))
    assert data.label_answers == {"snli": ["no", "yes"], "cola": ["acceptable", "unacceptable"]}
    mixed = [Example("?", 0, answer) for answer in ("Yes", "yes", "no", *"abcdefgh")]
    assert label_answers(mixed * 3) == ()  # ten different ones in 33
    assert label_answers(mixed[:3] * 7) == ("no", "yes")


@pytest.mark.parametrize(
    ("answer", "right"), [("Yes.", 1.0), (" yes ", 1.0), ("yes no", 0.0), ("", 0.0), ("no", 0.0)], ids=str
)
def test_a_label_is_right_whatever_its_case_and_punctuation(answer: str, right: float) -> None:
    assert label_match(answer, "yes") == right


def test_a_run_scores_labels_where_answers_are_labels_and_the_rest_as_before(tmp_path: Path) -> None:
    words = (
        "task=flan", f"task.path={write(tmp_path)}", "task.languages=[all]", "task.clients_per_language=3",
        "methods=[lora]", "base.name=none", "budgets=[1]", "personalise.pools=[seen]",
    )  # fmt: skip
    metrics = run_tiny(talk(tmp_path / "runs", *words)).metrics()
    found = {name: set(part["language"]) for name, part in metrics.groupby("metric")}
    assert found["label_accuracy"] == set(ANSWERS)
    assert found["exact_match"] == found["rougeL"] == found["loss"] == set(TASKS)
    labels = metrics[metrics["metric"] == "label_accuracy"]
    assert labels["weight"].tolist() == [4.0, 4.0]
    assert [measure.name for measure in answer_measures(scored_rows(checked(metrics)))][-2:] == [
        "exact_match",
        "label_accuracy",
    ]


def test_a_copy_without_a_task_drops_and_counts_its_test_rows(tmp_path: Path) -> None:
    data = made(write(tmp_path, tests=(*TASKS, "wic")))
    assert data.labels == TASKS
    assert data.manifest["notes"]["dropped_tests_of_absent_tasks"] == 10


def test_tasks_can_be_chosen(tmp_path: Path) -> None:
    assert made(write(tmp_path), languages=("cola",), clients_per_language=1).labels == ("cola",)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"subset": None}, ConfigError, "'task.subset' names no data set of flan .allowed: dataset1, dataset2"),
        ({"dealing": None}, ConfigError, "'task.dealing' says how flan's rows become clients"),
        ({"languages": ("snly",)}, ConfigError, "'snly', no task of flan/dataset1.*did you mean 'snli'"),
        ({"languages": ("wic",)}, DataError, "no training rows of wic .has: snli, cola, fix_punct"),
        (
            {"clients_per_language": 7},
            ConfigError,
            "7 clients are asked for .*'flan/dataset1' has 3 tasks .*allowed: 3",
        ),
        ({"subset": "dataset2"}, DataError, "dataset2/8 holds none of local_training_0.json"),
        ({"path": None}, DataError, "the data of task=flan are not on this machine: set task.path"),
    ],
    ids=["no data set", "no dealing", "unknown task", "absent task", "seven clients", "no files", "no place"],
)
def test_what_cannot_be_loaded_is_refused(
    keys: dict[str, Any], error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    with pytest.raises(error, match=message):
        made(write(tmp_path), **keys)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("8/local_training_1.json", '[{"instruction": "a"', r"local_training_1\.json"),
        ("8/local_training_1.json", '[{"instruction": "a", "output": "b", "task": "poem"}]', "row 0: 'task' is 'poem'"),
        ("8/local_training_1.json", '[{"instruction": "a", "task": "snli"}]', "row 0: keys instruction, task fit none"),
        (
            "flan_test_200_selected_nstrict_1.jsonl",
            '{"instruction": "a", "output": "b", "task": "snli"}',
            "no test rows",
        ),
        ("flan_test_200_selected_nstrict_1.jsonl", None, "missing file, one of flan_test"),
    ],
    ids=["truncated", "unknown task", "no response", "a task without test rows", "no test file"],
)
def test_damaged_files_are_named(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    file = write(tmp_path) / "dataset1" / name
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        flan.load(task_config("flan", path=str(tmp_path), clients_per_language=3), 42)


@needs_data
@pytest.mark.parametrize(
    ("subset", "tasks", "labelled"),
    [
        ("dataset1", 7, {"snli": 3, "cola": 2, "trec": 6, "wic": 2}),
        ("dataset2", 6, {"qnli": 2, "paws_wiki": 2, "bool_q": 2}),
    ],
)
def test_the_real_files_have_300_training_and_200_test_rows_of_each_task(
    subset: str, tasks: int, labelled: dict[str, int], tmp_path: Path
) -> None:
    data = made(tmp_path, path=None, subset=subset, clients_per_language=tasks)
    assert counts(data, "train").tolist() == np.diag([300] * tasks).tolist()
    assert counts(data, "test").tolist() == np.diag([200] * tasks).tolist()
    assert {task: len(labels) for task, labels in data.label_answers.items()} == labelled
    assert data.manifest["notes"]["leak_seen_train_test"] == 0
