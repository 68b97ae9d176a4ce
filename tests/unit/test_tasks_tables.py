"""Which rows of a user's own table are for train and which for test: by names of files and folders, or a column."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from fedtailor.core.errors import DataError
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.tables import OwnTable, own_table, part_of_file
from fedtailor.tasks.task import task_config


def lay(folder: Path, *names: str) -> TaskConfig:
    """Files of two rows each, whose texts say where they are; the configuration that reads their folder."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(2)))
    return task_config("texts", path=str(folder))


def by_split(table: OwnTable) -> dict[str | None, set[str]]:
    found: dict[str | None, set[str]] = {}
    for row, split in zip(table.rows, table.splits, strict=True):
        found.setdefault(split, set()).add(row.values["text"].rpartition(" ")[0])
    return found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("train-00000-of-00001.jsonl", "train"),
        ("Train.csv", "train"),
        ("reviews_test.csv", "test"),
        ("TEST.tsv.gz", "test"),
        ("validation.parquet", "validation"),
        ("dev.tsv", "validation"),
        ("my data.val.jsonl", "validation"),
        ("trainData2.csv", "train"),
        ("my_test_data.csv", "test"),
        ("test/part-0.csv", "test"),
        ("test/train.csv", "train"),
        ("testimonials.csv", None),
        ("contest.csv", None),
        ("éval.csv", None),
        ("2024.csv", None),
    ],
)
def test_a_split_is_a_word_of_its_own_in_a_files_name_or_its_folders(name: str, part: str | None) -> None:
    assert part_of_file(Path("test set") / name, Path("test set")) == part


def test_test_rows_of_shards_never_reach_training(tmp_path: Path) -> None:
    cfg = lay(tmp_path, "train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "test-00000-of-00001.jsonl")
    assert by_split(own_table(cfg)) == {
        "train": {"train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"},
        "test": {"test-00000-of-00001.jsonl"},
    }


def test_what_describes_data_is_no_data(tmp_path: Path) -> None:
    cfg = lay(tmp_path, "train.jsonl", "test.jsonl", ".hidden.jsonl", "_index.jsonl")
    for name in ("dataset_info.json", "README.json", ".gitattributes", "LICENSE"):
        (tmp_path / name).write_text("{")
    assert by_split(own_table(cfg)) == {"train": {"train.jsonl"}, "test": {"test.jsonl"}}


def test_validation_is_for_test_where_nothing_else_is_and_left_out_where_something_is(tmp_path: Path) -> None:
    table = own_table(lay(tmp_path / "a", "train.jsonl", "dev.jsonl"))
    assert by_split(table) == {"train": {"train.jsonl"}, "test": {"dev.jsonl"}}
    assert table.notes["split"] == "of the data, validation for test"
    table = own_table(lay(tmp_path / "b", "train.jsonl", "valid.jsonl", "test.jsonl"))
    assert by_split(table) == {"train": {"train.jsonl"}, "test": {"test.jsonl"}}
    assert (table.notes["rows_read"], table.notes["dropped_validation_rows"]) == (6, 2)


def test_files_without_a_split_are_one_pool_and_so_is_train_alone(tmp_path: Path) -> None:
    for number, names in enumerate((("north.jsonl", "south.jsonl"), ("train.jsonl",))):
        table = own_table(lay(tmp_path / str(number), *names))
        assert by_split(table) == {None: set(names)}
        assert table.notes["split"] == "0.2 of every client for test"


def test_folders_of_splits_are_read_where_a_folder_has_no_files(tmp_path: Path) -> None:
    cfg = lay(tmp_path, "data/train/0.jsonl", "data/test/0.jsonl", ".cache/train/9.jsonl")
    assert by_split(own_table(cfg)) == {"train": {"data/train/0.jsonl"}, "test": {"data/test/0.jsonl"}}
    lay(tmp_path, "all.jsonl")
    assert by_split(own_table(cfg)) == {None: {"all.jsonl"}}


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train.jsonl", "extra.jsonl"], r"say their split \(train.jsonl\), those of others do not \(extra.jsonl\)"),
        (["train_test.jsonl", "b.jsonl"], "train_test.jsonl: the name says two splits, test and train"),
        (["test.jsonl", "dev.jsonl"], "no row to train on: all 4 are of test or validation"),
        (["notes.txt"], r"holds no file that ends in \.jsonl"),
    ],
)
def test_a_folder_that_leaves_open_what_is_for_test_is_refused(tmp_path: Path, names: list[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        own_table(lay(tmp_path, *names))


def rows(tmp_path: Path, *splits: object, name: str = "d.jsonl", column: str = "split") -> TaskConfig:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / name).write_text("".join(json.dumps({"text": f"{s} 0", column: s}) + "\n" for s in splits))
    return task_config("texts", path=str(tmp_path / name))


def test_a_column_says_the_split_in_any_case_and_by_any_of_its_names(tmp_path: Path) -> None:
    cfg = rows(tmp_path, "Train", " train ", "TEST", "Validation", "dev", column="Split")
    assert by_split(own_table(cfg)) == {"train": {"Train", " train "}, "test": {"TEST"}}
    named = rows(tmp_path, "train", "test", column="fold").model_copy(update={"split_column": "fold"})
    assert set(by_split(own_table(named))) == {"train", "test"}
    ignored = rows(tmp_path, "north", "south").model_copy(update={"split_column": None})
    assert by_split(own_table(ignored)) == {None: {"north", "south"}}


@pytest.mark.parametrize(
    ("splits", "name", "said"),
    [
        (["train", "tset"], "d.jsonl", "line 2: 'split' is 'tset'; allowed: train, .*task.split_column=null"),
        (["train", None, "test"], "d.jsonl", "line 2: no split, but other rows have one"),
        (["train", "test"], "train.jsonl", "line 2: 'split' is 'test', and the file's name says train"),
    ],
)
def test_a_column_that_leaves_the_split_open_is_refused(
    tmp_path: Path, splits: list[str], name: str, said: str
) -> None:
    cfg = rows(tmp_path, *splits, name=name)
    with pytest.raises(DataError, match=said):
        own_table(cfg.model_copy(update={"path": str(tmp_path)}))


def test_a_saved_data_set_has_its_own_splits_and_the_names_of_its_classes(tmp_path: Path) -> None:
    kinds = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    parts = {
        name: datasets.Dataset.from_dict({"text": [f"{name} 0"] * 2, "label": [1, -1]}, kinds)
        for name in ("train", "validation")
    }
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path))
    table = own_table(task_config("texts", path=str(tmp_path)))
    assert by_split(table) == {"train": {"train"}, "test": {"validation"}}
    assert [row.values["label"] for row in table.rows] == ["yes", None] * 2


def test_a_hub_id_may_name_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def loaded(*name: str, split: str) -> list[dict[str, str]]:
        asked.append((*name, split))
        return [{"text": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    own_table(task_config("texts", path="owner/set:plain", split="validation"))
    assert asked == [("owner/set", "plain", "validation")]
