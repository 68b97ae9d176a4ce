"""Task texts: a user's own labelled table in any form becomes the same clients; what was found is shown."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console

from fedtailor.cli.plan_views import show_data
from fedtailor.core.errors import ConfigError, DataError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.prepare import make_inputs
from fedtailor.storage.artifacts import Artifacts
from fedtailor.storage.files import Storage
from fedtailor.tasks import texts
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Source
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare, task_config
from fedtailor.tasks.tokens import TokenData


def table(clients: str = "abcd", each: int = 12, **more: Any) -> pd.DataFrame:
    """Rows in which a client's label is any of three, each as often."""
    names = ["no", "yes", "maybe; later"]
    return pd.DataFrame(
        {"client": name, "text": f'{name} said, "{i}"\nand wént', "label": names[i % 3], **more}
        for i in range(each)
        for name in clients
    )


def saved(path: Path, rows: pd.DataFrame | list[dict[str, Any]], **more: Any) -> TaskConfig:
    pd.DataFrame(rows).to_json(path, orient="records", lines=True, force_ascii=False)
    return task_config("texts", path=str(path), **more)


def loaded(path: Path, rows: pd.DataFrame | list[dict[str, Any]], **more: Any) -> Source:
    return texts.load(saved(path, rows, **more), 0)


def shown(data: TaskData, path: Path | str = "d.jsonl") -> str:
    console = Console(width=100, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    show_data(console, str(path), data.manifest)
    return console.export_text()


# ---- the same data in any form -------------------------------------------------------------------------------------


def test_the_same_rows_in_any_form_of_file_are_the_same_tokens(tmp_path: Path) -> None:
    rows = table(grade=1)
    lines = rows.to_json(orient="records", lines=True, force_ascii=False)
    forms = {
        "a.csv": rows.to_csv(index=False).encode(),
        "b.csv": rows.to_csv(index=False, sep=";").encode("utf-8-sig"),
        "c.csv": rows.to_csv(index=False, sep="|").encode(),
        "d.tsv": rows.to_csv(index=False, sep="\t").encode(),
        "e.csv.gz": gzip.compress(rows.to_csv(index=False).encode()),
        "f.parquet": rows.to_parquet(index=False),
        "g.jsonl": lines.encode("utf-8-sig"),
        "h.jsonl": lines.encode("utf-16"),
        "i.json": rows.to_json(orient="records", indent=1).encode(),
        "j.json": "\n".join(json.dumps(json.loads(line), indent=2) for line in lines.splitlines()).encode(),
    }
    words = ["task=texts", "task.max_length=16", "model=tiny-bert", "base.cohort=2", "strategy.cohort=2"]
    made, tokens = set(), set()
    for name, content in forms.items():
        (tmp_path / name).write_bytes(content)
        exp = compose([], [*words, f"task.path={tmp_path / name}"])
        inputs = make_inputs(exp, 1, Artifacts(Storage(tmp_path / "runs"), "test"))
        made.add((inputs.data, inputs.model, inputs.tokens))
        tokens.add(TokenData.open(tmp_path / "runs/artifacts" / inputs.tokens).hash)
    assert (len(made), len(tokens)) == (1, 1)


@pytest.mark.parametrize("form", ["csv", "parquet", "jsonl"])
def test_labels_are_whole_numbers_however_a_table_writes_them(tmp_path: Path, form: str) -> None:
    rows = table("ab").assign(label=[float(i % 3) + 9 for i in range(24)])
    path = tmp_path / f"d.{form}"
    if form == "csv":
        rows.to_csv(path, index=False)
        assert ",9.0\n" in path.read_text()
    elif form == "parquet":
        rows.astype({"label": "Int64"}).to_parquet(path)
    else:
        rows.to_json(path, orient="records", lines=True)
    source = texts.load(task_config("texts", path=str(path)), 0)
    assert source.labels == ("9", "10", "11")
    assert Counter(e.label for client in source.natural_clients for e in (*client.train, *client.test)) == {
        0: 8,
        1: 8,
        2: 8,
    }


def test_classes_are_those_of_all_splits_in_an_order_of_their_own(tmp_path: Path) -> None:
    rows = table("ab", split="train")
    rows = pd.concat([rows, table("ab", 3, split="test").assign(label="Absent")])
    source = loaded(tmp_path / "a.jsonl", rows)
    assert source.labels == ("Absent", "maybe; later", "no", "yes")
    assert loaded(tmp_path / "b.jsonl", rows[::-1]).labels == source.labels
    assert "Labels that only test rows have: Absent." in shown(prepare(saved(tmp_path / "c.jsonl", rows), 0, tmp_path))


# ---- clients -------------------------------------------------------------------------------------------------------


def test_a_column_names_clients_and_the_configuration_the_unseen_ones(tmp_path: Path) -> None:
    source = loaded(tmp_path / "d.jsonl", table("abc"), unseen=("b",))
    assert {o.id: (len(o.train), len(o.test)) for o in source.natural_clients} == {
        "seen/all/a": (9, 3),
        "unseen/all/b": (9, 3),
        "seen/all/c": (9, 3),
    }
    assert all(e.text.startswith(client.name) for client in source.natural_clients for e in client.train)


def test_a_client_is_of_the_group_that_most_of_its_rows_have(tmp_path: Path) -> None:
    rows = table("ab").assign(lang=["sw", "yo"] * 11 + ["yo", "yo"])
    data = prepare(saved(tmp_path / "d.jsonl", rows, group_column="lang"), 0, tmp_path / "out")
    assert [client.id for client in data.clients] == ["seen/sw/a", "seen/yo/b"]
    assert data.manifest["languages"] == ["sw", "yo"]
    assert data.labels == ("maybe; later", "no", "yes")


def test_without_a_column_of_clients_half_of_every_class_is_dealt_in_each_pool(tmp_path: Path) -> None:
    rows = table(each=30).drop(columns="client")
    data = prepare(saved(tmp_path / "d.jsonl", rows, clients_per_language=4), 3, tmp_path / "out")
    assert [client.id for client in data.pool("seen")] == [f"seen/all/{i:02d}" for i in range(4)]
    assert len(data.pool("unseen")) == 4
    counts = data.manifest["class_counts"]
    assert counts == {f"{p}/all/{s}": [n] * 3 for p in ("seen", "unseen") for s, n in (("train", 16), ("test", 4))}
    held = [text for o in data.clients for split in ("train", "test") for text in data.texts(o.id, split)[0]]
    assert sorted(held) == sorted(rows["text"])
    other = saved(tmp_path / "d.jsonl", table(each=30), clients_per_language=4, client_column=None)
    assert prepare(other, 3, tmp_path / "other").hash == data.hash
    assert "no column names a client: dealt with Dirichlet label skew, task.alpha = 0.5" in shown(data)


def test_dealt_texts_keep_the_splits_that_the_data_say(tmp_path: Path) -> None:
    rows = pd.concat([table(each=30, split="train"), table(each=9, split="test").assign(text="held out")])
    source = loaded(tmp_path / "d.jsonl", rows.drop(columns="client"), clients_per_language=2)
    parts = [(part, pool["all"].split(part)) for pool in source.pools.values() for part in ("train", "test")]
    assert [(split, len(part), {e.text == "held out" for e in part}) for split, part in parts] == [
        ("train", 60, {False}),
        ("test", 18, {True}),
    ] * 2


@pytest.mark.parametrize("key", ["unseen", "max_examples"])
def test_keys_about_the_datas_own_clients_are_refused_where_there_are_none(tmp_path: Path, key: str) -> None:
    cfg = saved(tmp_path / "d.jsonl", table().drop(columns="client"), **{key: ("a",) if key == "unseen" else 5})
    with pytest.raises(ConfigError, match=f"'task.{key}' is for clients that the data name, and no column"):
        texts.load(cfg, 0)


def test_all_clients_with_too_few_texts_are_named(tmp_path: Path) -> None:
    rows = pd.concat([table("aB"), table("bc", 2)])
    said = "2 of 4 clients with too few usable examples: client 'b' has 2, 'c' has 2; .*differ only in case, .*: B, b$"
    with pytest.raises(DataError, match=said):
        loaded(tmp_path / "d.jsonl", rows)


# ---- columns and cells ---------------------------------------------------------------------------------------------


def test_columns_are_found_by_usual_names_in_any_case_or_taken_as_named(tmp_path: Path) -> None:
    rows = table().rename(columns={"client": "User", "text": "Premise", "label": "Class"}).assign(hypothesis="so")
    source = loaded(tmp_path / "a.jsonl", rows)
    assert source.columns == {"text": "Premise", "pair": "hypothesis", "label": "Class", "client": "User"}
    assert source.natural_clients[0].train[0].pair == "so"
    more = {"text_column": "hypothesis", "pair_column": None, "label_column": "User", "client_column": None}
    assert loaded(tmp_path / "b.jsonl", rows, **more).columns == {"text": "hypothesis", "label": "User"}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"text_column": "txet"}, r"no column 'txet' \(task.text_column\); did you mean 'text'\?"),
        ({"label_column": "kind"}, r"no column 'kind' \(task.label_column\)\. Columns there: client, text, label"),
        ({"client_column": "who", "group_column": "where"}, "'who' .task.client_column.*'where' .task.group_column"),
        ({"label_column": "text"}, "the column 'text' would be two of text .text., pair .None., label .text."),
    ],
)
def test_missing_columns_are_named_with_their_keys(tmp_path: Path, more: dict[str, str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        loaded(tmp_path / "d.jsonl", table(), **more)


def test_columns_of_unusual_names_are_asked_for_all_at_once(tmp_path: Path) -> None:
    rows = table().rename(columns={"text": "corps", "label": "sujet"})
    with pytest.raises(DataError, match=r"no text column: none of text, .*task.text_column; no label column: none of"):
        loaded(tmp_path / "d.jsonl", rows)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"label": None}, r"no label in 1 of the 49 rows .*column 'label', task.*line 49\. Label them or leave"),
        ({"label": "  "}, "no label in 1 of the 49 rows with a text"),
        ({"label": 0.5}, "line 49: the label 0.5 .* is no class: a label is a name or a whole number"),
        ({"label": "3.25"}, "line 49: the label '3.25' .* is no class"),
        ({"label": ["a", "b"]}, r"line 49: the label \['a', 'b'\] .* is no class"),
        ({"text": 7}, r"line 49: column 'text' holds 7 \(int\), not a text"),
        ({"client": None}, r"line 49: 'client' \(task.client_column\) is None; it must be a name"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_with_its_place(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    cfg = saved(tmp_path / "d.jsonl", table())
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write(json.dumps({"client": "a", "text": "b", "label": "no"} | row))
    with pytest.raises(DataError, match=said):
        texts.load(cfg, 0)


# ---- what plan shows -----------------------------------------------------------------------------------------------


def test_what_was_found_and_left_out_is_shown(tmp_path: Path) -> None:
    rows = pd.concat(
        [
            table("ab", split="train"),
            table(["Zoë", "ZOE\u0308"], 6, split="train"),  # type: ignore[arg-type]
            table(["a", "b", "Zoë", "ZOE\u0308"], 3, split="test"),  # type: ignore[arg-type]
            table("a", 2, split="dev"),
            table("a", 4, split="train").assign(text=" "),
        ]
    )
    text = shown(prepare(saved(tmp_path / "d.jsonl", rows, unseen=("b",)), 0, tmp_path / "out"))
    lines = [line.strip() for line in text.splitlines()]
    assert "54 rows; text 'text', label 'label', client 'client'" in text
    assert "split: of the data" in text
    assert any(line.split() == ["seen", "3", "24", "9", "9", "9", "15"] for line in lines)
    assert any(line.split() == ["unseen", "1", "12", "3", "15", "15", "15"] for line in lines)
    assert any(line.split() == ["yes", "12", "4"] for line in lines)
    assert "4 rows left out: without a text." in text
    assert "2 rows left out: of validation, as there are rows of test." in text
    assert "9 texts are in train and in test; task.drop_duplicates=true takes them out of test." in text
    assert "These clients differ only in case, blanks or Unicode form: Zoë, ZOE\u0308." in text


def test_instructions_are_shown_too_and_test_rows_that_are_trained_on_can_be_taken_out(tmp_path: Path) -> None:
    rows = [
        {"client": c, "instruction": f"ask {c} {i % 4}", "response": "say", "split": "test" if i > 3 else "train"}
        for c in "ab"
        for i in range(6)
    ]
    rows += [{"client": c, "instruction": f"new {c}", "response": "say", "split": "test"} for c in "ab"]
    pd.DataFrame(rows).to_json(tmp_path / "d.jsonl", orient="records", lines=True)
    cfg = task_config("instructions", path=str(tmp_path / "d.jsonl"))
    text = shown(prepare(cfg, 0, tmp_path / "kept"))
    assert "14 rows; client 'client'" in text
    assert "4 examples are in train and in test" in text
    clean = prepare(cfg.model_copy(update={"drop_duplicates": True}), 0, tmp_path / "clean")
    assert "4 rows take no part (task.drop_duplicates=true)." in shown(clean)
    assert "in train and in test" not in shown(clean)


def test_the_files_of_a_folder_are_shown_with_their_splits(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    for name in ("train-0.jsonl", "train-1.jsonl", "Test.jsonl"):
        cfg = saved(folder / name, table()).model_copy(update={"path": str(folder)})
    data = prepare(cfg, 0, tmp_path / "out")
    assert "files: Test.jsonl (test); train-0.jsonl, train-1.jsonl (train)" in shown(data, folder)
    (folder / "north.jsonl").write_text("")
    for name in ("train-0.jsonl", "train-1.jsonl", "Test.jsonl"):
        (folder / name).unlink()
    assert "files: north.jsonl; no name says a split" in shown(data, folder)
