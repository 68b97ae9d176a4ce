"""Rows of several tasks dealt to seen clients: one task each or Dirichlet shares; the same test rows for any number."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import talk

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.experiment.config import scaled_task, seen_clients, stored_experiment, to_json
from fedtailor.tasks import dolly
from fedtailor.tasks.dolly import DOLLY_CATEGORIES
from fedtailor.tasks.task import TaskData, prepare, task_config

TRAIN, TEST = (283, 342, 292, 114, 350, 242, 578, 202), (71, 85, 73, 28, 88, 60, 144, 51)
"""80 and 20 % of each category of pFedGPT's sample."""


Sample = Callable[..., TaskData]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    """PFedGPT's sample, dealt to so many clients; each way once."""

    @cache
    def dealt(clients: int, seed: int = 42, **keys: Any) -> TaskData:
        given = {"dealing": "dirichlet", "path": "sample", "pools": ("seen",), "test_fraction": 0.2, **keys}
        cfg = task_config("dolly", clients_per_language=clients, **given)
        return prepare(cfg, seed, tmp_path_factory.mktemp("dealt") / "data")

    return dealt


def counts(data: TaskData, split: str) -> np.ndarray:
    return np.array([client[f"{split}_classes"] for client in data.manifest["clients"]])


def judged_by(data: TaskData) -> list[str]:
    return sorted(text for client in data.clients for text in data.texts(client.id, "test")[0])


def test_task_specific_clients_have_all_rows_of_one_category_alone(sample: Sample) -> None:
    data = sample(8, dealing="task_specific")
    assert [client.id for client in data.clients] == [f"seen/dolly/{k:02d}" for k in range(8)]
    assert data.labels == DOLLY_CATEGORIES
    assert counts(data, "train").tolist() == np.diag(TRAIN).tolist()
    assert counts(data, "test").tolist() == np.diag(TEST).tolist()
    assert data.manifest["rows"] == data.manifest["notes"]["rows_read"] == 3003


def test_any_number_of_clients_is_judged_by_the_same_test_rows(sample: Sample) -> None:
    made = {clients: sample(clients) for clients in (8, 20, 50)}
    one_task_each = sample(8, dealing="task_specific")
    for clients, data in made.items():
        assert len(data.clients) == clients
        assert judged_by(data) == judged_by(one_task_each)
        assert counts(data, "train").sum(0).tolist() == list(TRAIN)
        assert counts(data, "test").sum(0).tolist() == list(TEST)
        notes, smallest = data.manifest["notes"], counts(data, "train").sum(1).min()
        assert notes["smallest_client"] == smallest >= notes["min_size"] == {8: 40, 20: 30, 50: 12}[clients]
        assert counts(data, "test").sum(1).min() >= 1
        assert 0 <= notes["redraws"] < 1000
        assert notes["leak_seen_train_test"] == 0


def test_test_rows_follow_the_clients_own_train_shares(sample: Sample) -> None:
    data = sample(8)
    train, test = counts(data, "train"), counts(data, "test")
    assert np.abs(test - test.sum(0) * train / train.sum(0)).max() < 1
    assert (train.max(1) > 1.5 * train.sum(1) / 8).all()  # skewed: nobody has equal shares


def test_clients_that_are_full_get_no_more_of_a_task(sample: Sample) -> None:
    sizes = counts(sample(8, alpha=0.05, min_size=1), "train")
    before = np.cumsum(sizes, axis=1) - sizes
    assert (sizes[before >= sizes.sum() / 8] == 0).all()


def test_equal_seeds_deal_alike_and_other_seeds_do_not(sample: Sample) -> None:
    first, again = sample(8), sample(8, alpha=0.5)
    assert again.manifest == first.manifest
    other = sample(8, seed=5)
    assert judged_by(other) != judged_by(first)
    assert counts(other, "train").tolist() != counts(first, "train").tolist()


def test_the_pool_is_the_same_rows_for_any_number_of_clients(sample: Sample) -> None:
    eight, fifty = (sample(n, validation_per_class=40) for n in (8, 50))
    assert eight.manifest["validation"] == fifty.manifest["validation"]
    assert len(eight.pool_rows) == 320
    with pytest.raises(DataError, match="class 'creative_writing' has 114 at seen clients; at most 113 leave"):
        sample(8, validation_per_class=114)


def test_a_limit_keeps_each_clients_share_of_test_rows_and_no_other_texts(sample: Sample) -> None:
    data = sample(8, max_examples=40)
    assert all(c.n_train + c.n_test == 40 and 7 <= c.n_test <= 10 for c in data.clients)
    assert data.manifest["rows"] == 320
    few = counts(data, "train")
    assert ((few > 0).sum(1) > 1).all()  # drawn from all of a client's tasks


def dolly_rows(folder: Path, **more: list[Any]) -> str:
    rows = [
        {"instruction": f"{category} {k}?", "context": f"about {k}", "response": f"yes {k}", "category": category}
        for category in DOLLY_CATEGORIES[:2]
        for k in range(10)
    ]
    rows += [{**rows[0]}, {**rows[0]}]
    folder.mkdir(exist_ok=True)
    (folder / "databricks-dolly-15k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def small(folder: Path, **keys: Any) -> TaskData:
    given = {"languages": DOLLY_CATEGORIES[:2], "pools": ("seen",), "dealing": "task_specific", **keys}
    given = {"path": dolly_rows(folder), "clients_per_language": 2, **given}
    return prepare(task_config("dolly", **given), 42, folder / "out")


def test_repeated_rows_stay_and_are_never_for_test(tmp_path: Path) -> None:
    for seed in range(5):
        source = dolly.load(small_config(tmp_path), seed)
        part = source.pools["seen"]["dolly"]
        assert len(part.train) + len(part.test) == 22
        assert sum(e.text.startswith("brainstorming 0?") for e in part.train) == 3
        assert not any(e.text.startswith("brainstorming 0?") for e in part.test)


def small_config(folder: Path) -> Any:
    given = {"languages": DOLLY_CATEGORIES[:2], "pools": ("seen",), "dealing": "task_specific"}
    return task_config("dolly", path=dolly_rows(folder), clients_per_language=2, **given)


def test_contexts_can_be_left_out_as_pfedgpts_code_does(tmp_path: Path) -> None:
    texts, _ = small(tmp_path / "with").texts("seen/dolly/00", "train")
    bare, _ = small(tmp_path / "without", context=False).texts("seen/dolly/00", "train")
    assert all("\n\nabout" in text for text in texts)
    assert sorted(text.partition("\n\n")[0] for text in texts) == sorted(bare)


def test_without_dealing_dolly_is_what_it_was(tmp_path: Path) -> None:
    data = prepare(task_config("dolly", path="sample", clients_per_language=2), 42, tmp_path)
    assert data.hash == "7f0e4b6f4c7b3f3a6c0e9e3832eee3ae29df8c64f2bb49ef5de6ee30f16d09bc"
    assert {"dealing", "min_size", "context"}.isdisjoint(data.manifest["config"])


def test_a_stored_run_without_the_keys_is_dealt_as_before(tmp_path: Path) -> None:
    exp = talk(tmp_path, "methods=[base]")
    tree = to_json(exp)
    for key in ("dealing", "min_size", "context", "validation_per_class"):
        del tree["task"][key]
    assert stored_experiment(tree) == exp


def test_the_number_of_clients_is_known_without_the_data_and_scales(tmp_path: Path) -> None:
    words = ("task=dolly", "task.pools=[seen]", "task.dealing=dirichlet", "task.clients_per_language=20")
    exp = talk(tmp_path, *words, "task.languages=[open_qa,general_qa]", "methods=[base]", "personalise.pools=[seen]")
    assert seen_clients(exp) == 20
    quarter = exp.model_copy(update={"scale": 0.25})
    assert seen_clients(quarter) == 5
    data = prepare(scaled_task(quarter).model_copy(update={"path": "sample"}), 42, tmp_path / "data")
    assert [client.id for client in data.clients] == [f"seen/dolly/{k:02d}" for k in range(5)]


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        (
            {"clients_per_language": 20},
            ConfigError,
            r"task_specific gives each task a client of its own: 20 clients are asked for .*has 2 tasks .*allowed: 2",
        ),
        (
            {"dealing": "dirichlet", "clients_per_language": 4, "min_size": 6},
            DataError,
            r"none of 1000 draws .* of 18 training rows gives each of 4 clients .* the largest minimum seen is [1-4]\.",
        ),
    ],
    ids=["other number of clients", "min_size that no draw reaches"],
)
def test_what_cannot_be_dealt_is_refused(
    keys: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        small(tmp_path, **keys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["task=dolly", "task.dealing=dirichlet"], "'task.dealing' deals all rows to seen clients: set task.pools"),
        (["task=dolly", "task.pools=[seen]", "task.min_size=3"], "'task.min_size' is of task.dealing=dirichlet alone"),
        (["task.dealing=dirichlet", "task.pools=[seen]"], "'task.dealing' is of task=dolly and task=flan alone"),
        (
            ["task=dolly", "task.dealing=dirichlet", "task.pools=[seen]", "task.resample=5"],
            "'task.dealing' excludes 'task.sorted_share' and 'task.resample'",
        ),
    ],
    ids=["both pools", "min_size alone", "another task", "resample"],
)
def test_keys_that_exclude_each_other_are_refused(words: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        talk(tmp_path, *words, "methods=[base]", "personalise.pools=[seen]")
