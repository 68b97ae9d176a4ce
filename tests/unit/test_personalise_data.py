"""A user's own data: what is read, which columns and labels are found, what is held out, and what is refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.personalise.data import (
    Rows,
    Table,
    hold_out,
    instructed,
    labelled,
    limited,
    read_data,
    read_tables,
    refuse_single_class,
    shared_texts,
)
from fedtailor.tasks.columns import Columns
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.rows import Row
from fedtailor.tasks.source import Example
from fedtailor.tasks.task import task_config

CLASSES = ("business", "sports", "health")
USUAL = task_config("texts", client_column=None)
ROWS = [("Bei ya mafuta", "business"), ("Timu, imeshinda", "sports"), ('Alisema "ndiyo"', "sports")]


def csv(path: Path, rows: list[tuple[str, str]] = ROWS, **more: Any) -> str:
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False, **more)
    return str(path)


def read(source: str) -> Rows:
    return labelled(read_tables(source, "--data", "train")[0], USUAL, CLASSES)


def named(**columns: str) -> TaskConfig:
    return USUAL.model_copy(update={f"{what}_column": name for what, name in columns.items()})


def table(**columns: list[Any]) -> Table:
    cells = enumerate(zip(*columns.values(), strict=True), start=1)
    rows = [Row(f"mine.csv, row {n}", dict(zip(columns, row, strict=True))) for n, row in cells]
    return Table("mine.csv", rows, "0" * 64)


def made(labels: list[int], texts: list[str] | None = None) -> Rows:
    words = texts or [f"text {i}" for i in range(len(labels))]
    names = Columns("text", "label")
    rows = tuple(map(Example, words, labels))
    return Rows("mine.csv", "0" * 64, names, rows, len(labels), 0)


def texts(data: Rows) -> list[str]:
    return [row.text for row in data.examples]


def pairs(data: Rows) -> list[str | None]:
    return [row.pair for row in data.examples]


# ---- what can be read ------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    frame = pd.DataFrame(ROWS, columns=["text", "label"])
    sources = [csv(tmp_path / "a.csv"), csv(tmp_path / "b.tsv", sep="\t"), csv(tmp_path / "c.csv", sep=";")]
    frame.to_parquet(tmp_path / "d.parquet", index=False)
    frame.to_json(tmp_path / "e.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "f.json", orient="records")
    sources += [str(tmp_path / name) for name in ("d.parquet", "e.jsonl", "f.json")]
    for source in sources:
        found = read(source)
        assert list(zip(texts(found), found.labels, strict=True)) == [(t, CLASSES.index(c)) for t, c in ROWS], source


def test_a_folder_of_the_datasets_library_is_read_with_its_own_class_names(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features({"text": Value("string"), "label": ClassLabel(names=["health", "sports"])})
    parts = {
        "train": Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features),
        "test": Dataset.from_dict({"text": ["c"], "label": [1]}, features=features),
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    found = read(str(tmp_path / "saved"))
    assert (texts(found), [CLASSES[i] for i in found.labels]) == (["a", "b"], ["sports", "health"])
    held = read_tables(str(tmp_path / "saved"), "--data", "train")[1]
    assert held is not None
    assert [dict(row.values) for row in held.rows] == [{"text": "c", "label": "sports"}]
    (tmp_path / "plain").mkdir()
    csv(tmp_path / "plain/train.csv")
    assert len(read(str(tmp_path / "plain"))) == 3


def test_the_column_of_splits_is_named_or_said_not_to_be_one(tmp_path: Path) -> None:
    rows = [(f"text {i}", CLASSES[i % 3], f"fold {i % 2}", "test" if i > 3 else "train") for i in range(6)]
    source = str(tmp_path / "a.csv")
    pd.DataFrame(rows, columns=["text", "label", "split", "part"]).to_csv(source, index=False)
    with pytest.raises(DataError, match=r"line 2: 'split' is 'fold 0'; allowed: .*\(--split none if it says something"):
        read_tables(source, "--data", "train")
    with pytest.raises(DataError, match=r"no column 'fold' \(--split\); columns there: text, label, split, part"):
        read_tables(source, "--data", "train", "fold")
    train, held = read_tables(source, "--data", "train", "part")
    assert held is not None
    assert (len(train.rows), len(held.rows)) == (4, 2)
    assert read_tables(source, "--data", "train", None)[1] is None


def test_the_words_na_null_and_nan_are_texts_and_line_breaks_in_quotes_stay(tmp_path: Path) -> None:
    rows = [("NA", "sports"), ("null", "sports"), ("nan", "health"), ("a\nb", "sports")]
    assert texts(read(csv(tmp_path / "a.csv", rows))) == ["NA", "null", "nan", "a\nb"]


# ---- what cannot -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("empty.csv", "", "holds no row"),
        ("header.csv", "text,label\n", "holds no row"),
        ("notes.docx", "text,label\n", r"ending is not one of \.jsonl, .*\.csv"),
        ("long.csv", "text,label\nHello, world,sports\n", "line 2: 3 columns, expected 2"),
        ("open.csv", 'text,label\n"a,sports\nb,sports\n', "line 2: damaged or truncated CSV"),
        ("a.jsonl", '{"text": "a", "label": "sports"}\n{"text": "b"', "line 2: damaged JSON"),
        ("a.parquet", "PAR1 not really", "cannot be read as Parquet"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str, content: str, told: str) -> None:
    """More of what can be wrong with a table: `test_tasks_rows.py`."""
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=told) as caught:
        read(str(path))
    assert name in str(caught.value)


def test_what_is_not_there_is_named_with_its_option() -> None:
    with pytest.raises(DataError, match=r"cannot load nobody/nothing \(train\) from the hub"):
        read("nobody/nothing")
    with pytest.raises(ConfigError, match=r"--data is 'none.csv': no such file or folder, nor an id on the hub"):
        read("none.csv")


# ---- columns and rows ------------------------------------------------------------------------------------


def test_columns_are_found_by_usual_names_or_taken_as_named() -> None:
    found = labelled(table(Title=["x"], Sentence=["a"], Category=["sports"]), USUAL, CLASSES)
    assert found.columns == Columns("Sentence", "Category")
    paired = labelled(table(premise=["a"], hypothesis=["b"], label=["sports"]), USUAL, CLASSES)
    assert paired.columns == Columns("premise", "label", "hypothesis")
    assert pairs(paired) == ["b"]
    own = labelled(
        table(text=["x"], body=["a"], kind=["sports"]), named(text="body", pair="text", label="kind"), CLASSES
    )
    assert (texts(own), pairs(own)) == (["a"], ["x"])


def test_missing_columns_are_told_all_at_once_with_those_present() -> None:
    with pytest.raises(DataError) as caught:
        labelled(table(corps=["a"], sujet=["sports"]), USUAL, CLASSES)
    told = str(caught.value)
    assert "no text column: none of text, sentence" in told
    assert "no label column: none of label, labels, category" in told
    assert told.endswith("Columns there: corps, sujet")
    with pytest.raises(DataError, match=r"no column 'b' \(--pair\).*Columns there: text, label"):
        labelled(table(text=["a"], label=["sports"]), named(pair="b"), CLASSES)
    with pytest.raises(DataError, match=r"the column 'text' would be two of text .*name them with --text and alike$"):
        labelled(table(text=["a"], label=["sports"]), named(label="text"), CLASSES)


def test_rows_with_an_empty_text_are_left_out_and_counted() -> None:
    found = labelled(table(text=["a", "", None, "  ", "b"], label=["sports"] * 5), USUAL, CLASSES)
    assert (texts(found), found.rows, found.empty) == (["a", "b"], 5, 3)
    paired = labelled(table(premise=["a", "b"], hypothesis=["", "d"], label=[0, 1]), USUAL, CLASSES)
    assert (texts(paired), pairs(paired), paired.empty) == (["b"], ["d"], 1)
    with pytest.raises(DataError, match=r"all 2 rows have an empty text \(column 'text'\)"):
        labelled(table(text=["", " "], label=["sports"] * 2), USUAL, CLASSES)


def test_a_text_that_is_no_text_is_refused_with_its_row() -> None:
    with pytest.raises(DataError, match=r"mine\.csv, row 2: column 'text' holds 7 \(int\)"):
        labelled(table(text=["a", 7], label=["sports"] * 2), USUAL, CLASSES)
    half = json.loads('"\\ud800"')
    with pytest.raises(DataError, match=r"row 1: .*half a surrogate pair"):
        labelled(table(text=[half], label=["sports"]), USUAL, CLASSES)


# ---- labels ----------------------------------------------------------------------------------------------


def test_labels_are_names_in_any_case_or_numbers() -> None:
    given = ["sports", " Sports ", "SPORTS", 1, "1", 1.0, "1.0"]
    assert labelled(table(text=["t"] * 7, label=given), USUAL, CLASSES).labels == [1] * 7


def test_a_class_named_like_a_number_wins_over_the_number() -> None:
    assert labelled(table(text=["a", "b"], label=["1", "0"]), USUAL, ("1", "0")).labels == [0, 1]


@pytest.mark.parametrize("label", ["sport", 3, -1, "1.5", True, [1], "9" * 5000, "²"])
def test_an_unknown_label_is_named_with_its_row_and_the_allowed_ones(label: Any) -> None:
    with pytest.raises(DataError) as caught:
        labelled(table(text=["a", "b"], label=["sports", label]), USUAL, CLASSES)
    told = str(caught.value)
    assert f"{label!r:.60} (mine.csv, row 2)" in told
    assert told.endswith("allowed: business (0), sports (1), health (2)")


@pytest.mark.parametrize("missing", ["", "  ", None, float("nan")])
def test_a_missing_label_is_refused_unless_its_text_is_empty_too(tmp_path: Path, missing: Any) -> None:
    frame = pd.DataFrame({"text": ["a", "b", ""], "label": ["sports", missing, missing]})
    for name, save, at in (("a.parquet", frame.to_parquet, "row 1"), ("a.csv", frame.to_csv, "line 3")):
        save(tmp_path / name, index=False)
        place = rf"1 of 2 rows have no label in column 'label' \({name}, {at}\); give"
        with pytest.raises(DataError, match=place):
            read(str(tmp_path / name))


# ---- what is held out ------------------------------------------------------------------------------------


def test_held_out_rows_are_a_share_of_each_class_and_a_function_of_the_seed() -> None:
    data = made([0] * 50 + [1] * 30 + [2] * 20)
    train, test = hold_out(data, 0.2, 42)
    assert (Counter(test.labels), Counter(train.labels)) == ({0: 10, 1: 6, 2: 4}, {0: 40, 1: 24, 2: 16})
    assert not set(texts(train)) & set(texts(test))
    assert hold_out(data, 0.2, 42) == (train, test)
    assert hold_out(data, 0.2, 43) != (train, test)


def test_no_class_loses_its_last_training_row() -> None:
    train, _ = hold_out(made([0, 1, 2, 2, 2, 2]), 0.9, 1)
    assert set(train.labels) == {0, 1, 2}


def test_equal_texts_stay_on_one_side() -> None:
    data = made([0, 1] * 20, [f"Same  TEXT {i // 4}" if i % 2 else f"same text {i // 4}" for i in range(40)])
    for seed in range(5):
        train, test = hold_out(data, 0.3, seed)
        assert shared_texts(train, test) == 0
        assert len(test)
    given = made([0], ["SAME text 3"])
    assert shared_texts(data, given) == 1


def test_too_few_rows_to_hold_any_out_ask_for_a_test_file() -> None:
    with pytest.raises(DataError, match=r"2 usable rows are too few to hold out 0\.2 of them.*--test"):
        hold_out(made([0, 1]), 0.2, 1)
    with pytest.raises(DataError, match="1 usable rows are too few"):
        hold_out(made([0]), 0.9, 1)


def test_a_limit_draws_rows_over_the_whole_file_in_its_order() -> None:
    data = made([0] * 50 + [1] * 50)
    some = limited(data, 20, 42)
    at = [texts(data).index(text) for text in texts(some)]
    assert at == sorted(at)
    assert (len(some), set(some.labels)) == (20, {0, 1})
    assert limited(data, 100, 42) is data


def test_one_class_is_nothing_to_learn() -> None:
    with pytest.raises(DataError, match=r"all 3 usable rows are of one class \(sports\).*at least two"):
        refuse_single_class(made([1, 1, 1]), CLASSES)
    refuse_single_class(made([1, 2]), CLASSES)


# ---- instructions, and rows that say themselves what they are for -------------------------------------------


def test_instructions_come_in_every_shape_and_incomplete_ones_are_left_out() -> None:
    rows = [
        {"instruction": "a", "context": "c", "response": "b"},
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "a", "output": " "},
    ]
    found = instructed(Table("mine.jsonl", [Row(f"mine.jsonl, line {n}", row) for n, row in enumerate(rows, 1)], ""))
    assert (texts(found), pairs(found), found.rows, found.empty) == (["a\n\nc", "a", "a"], ["b"] * 3, 4, 1)
    with pytest.raises(DataError, match="all 1 rows have an empty instruction or response"):
        instructed(Table("mine.jsonl", [Row("mine.jsonl, line 1", rows[3])], ""))


def test_rows_of_a_test_split_are_never_learned_from(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"text": list("abcdef"), "label": ["sports", "health"] * 3, "split": ["train"] * 4 + ["test"] * 2}
    )
    frame.to_csv(tmp_path / "mine.csv", index=False)
    for part, name in frame.groupby("split"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        name.drop(columns="split").to_csv(tmp_path / f"folder/my_{part}.csv", index=False)
    for source in ("mine.csv", "folder"):
        asked = (str(tmp_path / source), None, USUAL, CLASSES)
        train, test, how = read_data(*asked, None, None, 1)
        assert (texts(train), texts(test), how) == (["a", "b", "c", "d"], ["e", "f"], "by the data")
        with pytest.raises(ConfigError, match=rf"--test-fraction 0.5: {source} says itself which rows are for test"):
            read_data(*asked, 0.5, None, 1)
