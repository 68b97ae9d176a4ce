"""Tasks instructions, fed_aya and dolly: from rows of files and the hub to clients with instructions."""

from __future__ import annotations

import csv
import gzip
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reading

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks import dolly, fed_aya, instructions
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.dolly import DOLLY_CATEGORIES
from fedtailor.tasks.fed_aya import FED_AYA_LANGUAGES
from fedtailor.tasks.instructions import read_example
from fedtailor.tasks.rows import Row
from fedtailor.tasks.source import Example, NaturalClient, Source
from fedtailor.tasks.task import prepare, task_config

DATA = Path(os.environ.get("FEDTAILOR_DATA", ""))


def needs(name: str) -> pytest.MarkDecorator:
    there = bool(os.environ.get("FEDTAILOR_DATA")) and (DATA / name).is_dir()
    return pytest.mark.skipif(not there, reason=f"set FEDTAILOR_DATA to a folder that holds {name}/ to test with it")


def rows(client: str | int | None, n: int, **more: Any) -> list[dict[str, Any]]:
    return [{"client": client, "instruction": f"ask {client} {i}", "response": f"say {i}", **more} for i in range(n)]


def lines(values: Sequence[Any]) -> str:
    return "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values)


def write(path: Path, values: Sequence[Any]) -> TaskConfig:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(values), encoding="utf-8")
    return task_config("instructions", path=str(path))


def examples(client: NaturalClient) -> list[Example]:
    return [*client.train, *client.test]


def by_name(source: Source) -> dict[str, NaturalClient]:
    return {client.name: client for client in source.natural_clients}


# --- rows ---------------------------------------------------------------------------------------------------------


def test_the_last_assistant_message_is_the_response_and_the_last_user_message_the_instruction() -> None:
    talk = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4"},
    ]
    for messages in (talk, json.dumps(talk), [*talk, {"role": "user", "content": "left out"}]):
        found = read_example(Row("here", {"messages": messages}))
        assert (found.text, found.pair) == ("2 + 2?", "4")
        assert json.loads(found.history or "") == talk[:3]
    assert read_example(Row("here", {"messages": talk[1:3]})).history is None


def test_prompt_and_completion_may_be_texts_or_lists_of_messages() -> None:
    assert read_example(Row("here", {"prompt": "p", "completion": "c"})) == Example("p", 0, "c")
    asked, said = [{"role": "user", "content": "p"}], [{"role": "assistant", "content": "c"}]
    assert read_example(Row("here", {"prompt": asked, "completion": said})) == Example("p", 0, "c")


@pytest.mark.parametrize("context", ["input", "context"])
@pytest.mark.parametrize("response", ["response", "output"])
def test_the_context_belongs_to_the_instruction_and_a_blank_one_adds_nothing(context: str, response: str) -> None:
    fields = {"instruction": "Sum up.", context: "A text.", response: "A."}
    assert read_example(Row("here", fields)) == Example("Sum up.\n\nA text.", 0, "A.")
    assert read_example(Row("here", fields | {context: " "})).text == "Sum up."


def test_fields_that_are_null_leave_room_for_another_shape() -> None:
    fields = {"messages": None, "prompt": "p", "completion": "c", "instruction": None, "response": None}
    assert read_example(Row("here", fields)) == Example("p", 0, "c")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"question": "q", "answer": "a"}, "keys question, answer fit none of the shapes: 'messages'"),
        ({"instruction": "q"}, "keys instruction fit none"),
        ({"prompt": 7, "completion": "c"}, "'prompt' must be a text, this is of type int"),
        ({"messages": []}, "'messages' must be a list"),
        ({"messages": "{"}, "damaged JSON"),
        ({"messages": [{"role": "bot", "content": "c"}]}, "message 0: unknown role 'bot'; allowed: system, user"),
        ({"messages": [{"from": "human", "value": "c"}]}, "message 0: a message has a 'role' and a 'content'"),
        ({"messages": [{"role": "user", "content": "c"}]}, "no assistant message"),
        ({"messages": [{"role": "assistant", "content": "c"}]}, "a user message right before the last assistant"),
        (
            {"messages": [{"role": r, "content": r} for r in ("user", "system", "user", "assistant")]},
            "a system message can only be the first",
        ),
    ],
)
def test_rows_of_no_known_shape_are_refused_with_their_place(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=f"^here, line 3.*{said}"):
        read_example(Row("here, line 3", fields))


# --- instructions: files ------------------------------------------------------------------------------------------


def as_jsonl(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".jsonl")
    path.write_text(lines(values), encoding="utf-8")
    return path


def as_gzip(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".jsonl.gz")
    path.write_bytes(gzip.compress(lines(values).encode()))
    return path


def as_json_list(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(json.dumps(values, indent=2), encoding="utf-8")
    return path


def as_json_lines(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".json")
    path.write_text(lines(values), encoding="utf-8")
    return path


def as_csv(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".csv")
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        table = csv.DictWriter(stream, list(values[0]))
        table.writeheader()
        table.writerows(values)
    return path


def as_parquet(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(values), path)
    return path


def as_semicolons_in_utf16(path: Path, values: list[dict[str, Any]]) -> Path:
    path = path.with_suffix(".csv.gz")
    pd.DataFrame(values).to_csv(path, sep=";", index=False, encoding="utf-16")
    return path


FORMS = [as_jsonl, as_gzip, as_json_list, as_json_lines, as_csv, as_parquet, as_semicolons_in_utf16]


@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_in_any_form_of_file_are_the_same_task(
    form: Callable[[Path, list[dict[str, Any]]], Path], tmp_path: Path
) -> None:
    values = rows("b", 5) + rows("a", 4)
    values[0]["response"] = 'two\nlines, and "quotes"\u2028'
    file = form(tmp_path / "rows", values)
    source = instructions.load(task_config("instructions", path=str(file)), 0)
    want = instructions.load(write(tmp_path / "other" / "plain.jsonl", values), 0)
    assert source.natural_clients == want.natural_clients
    assert instructions.load(task_config("instructions", path=str(file)), 0).natural_clients == want.natural_clients


def test_a_folder_is_read_file_by_file_and_train_and_test_files_are_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "part2.jsonl", rows("b", 3))
    cfg = write(tmp_path / "part1.jsonl", rows("a", 3)).model_copy(update={"path": str(tmp_path)})
    (tmp_path / "README.md").write_text("no data")
    assert [o.name for o in instructions.load(cfg, 0).natural_clients] == ["a", "b"]
    write(tmp_path / "halves" / "train.jsonl", rows("a", 4))
    write(tmp_path / "halves" / "test.jsonl", [r | {"response": "held out"} for r in rows("a", 2)])
    (client,) = instructions.load(cfg.model_copy(update={"path": str(tmp_path / "halves")}), 0).natural_clients
    assert (len(client.train), len(client.test)) == (4, 2)
    assert {e.pair for e in client.test} == {"held out"}


def test_an_id_that_is_no_path_is_loaded_from_the_hub_and_its_failure_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def loaded(name: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, split))
        return rows(7, 3)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    source = instructions.load(task_config("instructions", path="owner/set", split="validation"), 0)
    assert [o.name for o in source.natural_clients] == ["7"]
    assert asked == [("owner/set", "validation")]

    def offline(name: str, split: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"owner/set \(train\) from the hub.*no route.*Set task.path to a"):
        instructions.load(task_config("instructions", path="owner/set"), 0)


# --- instructions: clients ----------------------------------------------------------------------------------------


def test_clients_come_in_order_of_first_appearance_and_are_split_by_the_fraction_rounded_up(tmp_path: Path) -> None:
    cfg = write(tmp_path / "r.jsonl", [*rows("z", 6), *rows("a", 10), *rows("m", 3)])
    source = instructions.load(cfg, 0)
    assert [(o.name, len(o.train), len(o.test)) for o in source.natural_clients] == [
        ("z", 4, 2),
        ("a", 8, 2),
        ("m", 2, 1),
    ]
    assert source.kind == "generation"
    assert source.labels == ("all",)
    assert source.notes["rows_read"] == 19


def test_a_client_is_shuffled_by_seed_and_its_own_name_alone(tmp_path: Path) -> None:
    both = write(tmp_path / "both.jsonl", [*rows("a", 30), *rows("b", 30)])
    alone = write(tmp_path / "alone.jsonl", rows("b", 30))
    first, other = instructions.load(both, 1), instructions.load(both, 2)
    assert by_name(first)["b"] == by_name(instructions.load(alone, 1))["b"]
    assert by_name(first)["b"].test != by_name(other)["b"].test
    a, b = ([e.text.split()[-1] for e in by_name(first)[name].test] for name in "ab")
    assert a != b
    assert Counter(examples(by_name(first)["b"])) == Counter(examples(by_name(other)["b"]))


def test_a_split_column_is_obeyed_in_file_order_and_one_that_always_says_train_is_not_one(tmp_path: Path) -> None:
    values = rows("a", 6)
    for i, row in enumerate(values):
        row["split"] = "test" if i % 2 else "train"
    (client,) = instructions.load(write(tmp_path / "r.jsonl", values), 0).natural_clients
    assert [e.text for e in client.train] == ["ask a 0", "ask a 2", "ask a 4"]
    assert [e.text for e in client.test] == ["ask a 1", "ask a 3", "ask a 5"]
    (client,) = instructions.load(write(tmp_path / "t.jsonl", rows("a", 5, split="train")), 0).natural_clients
    assert (len(client.train), len(client.test)) == (4, 1)


def test_a_group_column_gives_examples_their_group_and_clients_the_one_they_have_most(tmp_path: Path) -> None:
    values = [*rows("a", 2, lang="te"), *rows("a", 3, lang="en"), *rows("b", 3, lang="te/x")]
    cfg = write(tmp_path / "r.jsonl", values).model_copy(update={"group_column": "lang"})
    source = instructions.load(cfg, 0)
    assert source.labels == ("en", "te", "te%2Fx")
    assert [o.language for o in source.natural_clients] == ["en", "te%2Fx"]
    assert Counter(source.labels[e.label] for e in examples(source.natural_clients[0])) == {"en": 3, "te": 2}


def test_whole_numbers_that_pandas_wrote_as_floats_name_clients(tmp_path: Path) -> None:
    frame = pd.DataFrame([*rows(1, 3), *rows(2, 3), *rows(None, 1)])
    assert frame["client"].dtype == float
    frame.to_parquet(tmp_path / "all.parquet")
    with pytest.raises(DataError, match=r"all.parquet, row 6: 'client' \(task.client_column\) is None"):
        instructions.load(task_config("instructions", path=str(tmp_path / "all.parquet")), 0)
    frame.dropna().to_parquet(tmp_path / "some.parquet")
    source = instructions.load(task_config("instructions", path=str(tmp_path / "some.parquet")), 0)
    assert [client.name for client in source.natural_clients] == ["1", "2"]


def test_unseen_clients_are_named_as_in_the_data_and_numbers_may_be_numbers(tmp_path: Path) -> None:
    values = [*rows(1, 3), *rows(2, 3), *rows("org/3", 3)]
    cfg = TaskConfig.model_validate(
        {"name": "instructions", "path": str(as_jsonl(tmp_path / "r", values)), "unseen": [2, "org/3"]}
    )
    source = instructions.load(cfg, 0)
    assert {o.name: o.pool for o in source.natural_clients} == {"1": "seen", "2": "unseen", "org%2F3": "unseen"}


def test_max_examples_keeps_the_first_after_shuffling_and_the_shares_of_the_splits(tmp_path: Path) -> None:
    cfg = write(tmp_path / "r.jsonl", [*rows("a", 40), *rows("b", 4)]).model_copy(update={"max_examples": 10})
    a, b = instructions.load(cfg, 0).natural_clients
    assert (len(a.train), len(a.test), len(b.train), len(b.test)) == (8, 2, 3, 1)
    assert sorted(e.text for e in examples(a)) != sorted(f"ask a {i}" for i in range(10))
    values = [row | {"split": "test" if i >= 30 else "train"} for i, row in enumerate(rows("a", 40))]
    cfg = write(tmp_path / "s.jsonl", values).model_copy(update={"max_examples": 8})
    (a,) = instructions.load(cfg, 0).natural_clients
    assert (len(a.train), len(a.test)) == (6, 2)
    assert {e.text for e in a.test} < {f"ask a {i}" for i in range(30, 40)}


def test_rows_without_response_or_instruction_are_dropped_and_counted(tmp_path: Path) -> None:
    values = [*rows("a", 3), *rows("a", 2, response=" \n"), *rows("a", 1, response=None), *rows("a", 1, instruction="")]
    source = instructions.load(write(tmp_path / "r.jsonl", values), 0)
    assert len(examples(source.natural_clients[0])) == 3
    assert source.notes["dropped_empty_responses"] == 3
    assert source.notes["dropped_empty_instructions"] == 1


def test_test_examples_that_somebody_trains_on_are_dropped_on_request(tmp_path: Path) -> None:
    values = [*rows("a", 4, split="train"), *rows("a", 3, split="test")]
    values[-1]["response"] = "only here"
    cfg = write(tmp_path / "r.jsonl", values)
    (kept,) = instructions.load(cfg, 0).natural_clients
    (clean,) = instructions.load(cfg.model_copy(update={"drop_duplicates": True}), 0).natural_clients
    assert (len(kept.test), [e.pair for e in clean.test]) == (3, ["only here"])


def test_prepared_instructions_keep_response_history_and_group(tmp_path: Path) -> None:
    talk = [{"role": r, "content": f"{r} says"} for r in ("system", "user", "assistant")]
    values = [{"client": "a", "lang": "en", "messages": talk} for _ in range(4)]
    cfg = write(tmp_path / "r.jsonl", values).model_copy(update={"group_column": "lang"})
    data = prepare(cfg, 0, tmp_path / "out")
    assert [c.id for c in data.clients] == ["seen/en/a"]
    assert data.texts("seen/en/a", "train")[0] == ["user says"] * 3
    assert data.pairs("seen/en/a", "test") == ["assistant says"]
    assert data.manifest["kind"] == "generation"
    assert data.manifest["notes"]["rows_read"] == 4
    assert data.hash == reading.fingerprint(cfg, 0)


@pytest.mark.parametrize(
    ("values", "change", "said"),
    [
        (rows("a", 1), {}, "1 of 1 clients with too few usable examples: client 'a' has 1; at least 3 are needed"),
        (rows("a", 3) + rows("b", 3, response="") + rows("c", 2), {}, "2 of 3 clients .* 'b' has 0, 'c' has 2; at"),
        (rows("anna", 3), {"unseen": ("ana",)}, "no client 'ana' among the 1 clients .*did you mean 'anna'"),
        (rows("a", 3), {"client_column": "user"}, r"line 1: no column 'user' \(task.client_column\); columns: client,"),
        (rows("a", 3), {"group_column": "tongue"}, r"line 1: no column 'tongue' \(task.group_column\)"),
        ([*rows("a", 3), *rows(None, 1)], {}, r"line 4: 'client' \(task.client_column\) is None; it must be"),
        (rows("a", 3, split="live"), {}, "line 1: 'split' is 'live'; allowed: train, .*test.*task.split_column=null"),
        (rows("a", 3, split="dev"), {}, "no row to train on: all 3 are of validation"),
        (rows("a", 3) + rows("a", 3, split="test"), {}, "line 1: no split, but other rows have one"),
        ([*rows("a", 3), ["x"]], {}, "line 4: a row must be an object"),
    ],
)
def test_bad_rows_and_clients_are_refused_by_name(
    values: list[Any], change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    cfg = write(tmp_path / "r.jsonl", values).model_copy(update=change)
    with pytest.raises(DataError, match=said):
        instructions.load(cfg, 0)


def test_a_client_without_test_rows_and_a_task_without_seen_clients_are_refused(tmp_path: Path) -> None:
    values = [*rows("a", 3, split="train"), *rows("b", 3, split="train"), *rows("b", 1, split="test")]
    with pytest.raises(DataError, match=r"client 'seen/all/a' has 3 train and 0 test examples"):
        prepare(write(tmp_path / "r.jsonl", values), 0, tmp_path / "out")
    cfg = write(tmp_path / "s.jsonl", rows("a", 3)).model_copy(update={"unseen": ("a",)})
    with pytest.raises(DataError, match="at least one must be seen"):
        prepare(cfg, 0, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.jsonl", b'{"client": "a"\n', "r.jsonl, line 1: damaged JSON"),
        ("r.json", b'[{"client": "a"}, {"cli', "r.json: damaged JSON.*line 1 column"),
        ("r.jsonl", b'{"client": 1, "client": 2}\n', "line 1: damaged JSON: the key 'client' occurs twice"),
        ("r.jsonl.gz", gzip.compress(b"x" * 999, mtime=0)[:-9], "r.jsonl.gz, line 1: damaged or truncated gzip"),
        ("r.jsonl", b'{"client": "\xff"}', "line 1: not UTF-8"),
        (
            "r.csv",
            b"client,prompt,completion\na,p,c\na,p\n",
            "line 3: 2 columns, expected 3; the file may be truncated",
        ),
        ("r.csv", b'client,prompt,completion\na,p,"c\n', "line 2: damaged or truncated CSV"),
        ("r.parquet", b"PAR1 but not really", "cannot be read as Parquet"),
        ("r.jsonl", b"\n", "holds no row"),
        ("r.xlsx", b"x", "ending is not one of .jsonl"),
    ],
)
def test_damaged_files_are_refused_with_the_place(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        instructions.load(task_config("instructions", path=str(tmp_path / name)), 0)


def test_a_path_is_needed_and_one_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs 'task.path'"):
        instructions.load(task_config("instructions"), 0)
    for path in (str(tmp_path / "none"), "data/none.jsonl", "owner/name with blanks"):
        with pytest.raises(ConfigError, match="no such file or folder, nor an id"):
            instructions.load(task_config("instructions", path=path), 0)
    with pytest.raises(DataError, match=r"holds no file that ends in \.jsonl"):
        instructions.load(task_config("instructions", path=str(tmp_path)), 0)


# --- fed_aya ------------------------------------------------------------------------------------------------------


def aya_rows(client: int, n: int = 10) -> list[dict[str, str]]:
    """Rows of a client with a predominant language, a second one, and one row that is not among the 8."""
    first, second = FED_AYA_LANGUAGES[client % 8], FED_AYA_LANGUAGES[(client + 1) % 8]
    of = [first] * (n - 3) + [second] * 2 + ["hi"]
    return [{"instruction": f"{client} {i}", "response": f"r{i}", "language": code} for i, code in enumerate(of)]


def aya(folder: Path, content: Any = None, **more: Any) -> TaskConfig:
    folder.mkdir(exist_ok=True)
    content = {f"annotator{c}": aya_rows(c) for c in range(38)} if content is None else content
    (folder / "aya_38c_25k.json").write_text(json.dumps(content), encoding="utf-8")
    return task_config(**{"name": "fed_aya", "path": str(folder), **more})


def test_fed_aya_has_38_clients_by_place_8_of_them_unseen_and_8_languages(tmp_path: Path) -> None:
    source = fed_aya.load(aya(tmp_path), 0)
    assert [o.name for o in source.natural_clients] == [f"{c:02d}" for c in range(38)]
    assert [int(o.name) for o in source.natural_clients if o.pool == "unseen"] == [21, 22, 23, 24, 25, 26, 27, 34]
    assert source.labels == FED_AYA_LANGUAGES
    assert [o.language for o in source.natural_clients] == [FED_AYA_LANGUAGES[c % 8] for c in range(38)]
    assert {(len(o.train), len(o.test)) for o in source.natural_clients} == {(7, 2)}
    assert source.notes["dropped_other_languages"] == 38
    assert source.notes["rows_read"] == 380


def test_fed_aya_is_prepared_with_ids_of_pool_language_and_number(tmp_path: Path) -> None:
    data = prepare(aya(tmp_path), 0, tmp_path / "out")
    assert len(data.clients) == 38
    assert data.clients[0].id == "seen/ar/00"
    assert {c.id for c in data.pool("unseen")} == {
        f"unseen/{FED_AYA_LANGUAGES[c % 8]}/{c}" for c in (21, 22, 23, 24, 25, 26, 27, 34)
    }


def test_fed_aya_reads_lists_names_of_languages_and_the_names_of_fields_of_aya_itself(tmp_path: Path) -> None:
    values = [
        [{"inputs": f"q{c}{i}", "targets": "a", "language": name} for i in range(4)]
        for c, name in enumerate(["Standard Arabic", "Simplified Chinese", "Telugu"])
    ]
    cfg = aya(tmp_path, values, languages=["Telugu", "zh", "Arabic"], unseen=[2])
    source = fed_aya.load(cfg, 0)
    assert source.labels == ("te", "zh", "ar")
    assert [(o.name, o.language, o.pool) for o in source.natural_clients] == [
        ("00", "ar", "seen"),
        ("01", "zh", "seen"),
        ("02", "te", "unseen"),
    ]


def test_fed_aya_leaves_out_clients_that_do_not_speak_the_languages_asked_for(tmp_path: Path) -> None:
    content = {"a": aya_rows(0), "b": aya_rows(1), "c": aya_rows(2)}  # ar+en, en+es, es+fr
    source = fed_aya.load(aya(tmp_path, content, languages=["en", "es"], unseen=[0, 2]), 0)
    assert [(o.name, len(examples(o)), o.pool) for o in source.natural_clients] == [
        ("01", 9, "seen"),
        ("02", 7, "unseen"),
    ]
    assert source.notes["clients_without_these_languages"] == "00"


def test_fed_aya_is_found_by_file_by_folder_gzipped_and_in_the_data_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = aya(tmp_path / "fed_aya")
    plain = tmp_path / "fed_aya" / "aya_38c_25k.json"
    want = fed_aya.load(cfg, 0)
    assert fed_aya.load(cfg.model_copy(update={"path": str(plain)}), 0) == want
    plain.with_suffix(".json.gz").write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    monkeypatch.setenv("FEDTAILOR_DATA", str(tmp_path))
    assert fed_aya.load(task_config("fed_aya"), 0) == want


@pytest.mark.parametrize("where", ["nowhere", "data", "path"])
def test_without_its_file_fed_aya_says_where_to_get_it(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    if where == "data":
        monkeypatch.setenv("FEDTAILOR_DATA", str(tmp_path))
    path = str(tmp_path) if where == "path" else None
    with pytest.raises(DataError, match=r"FedLLM-Bench.*set task.path to its Fed-Aya/aya_38c_25k.json"):
        fed_aya.load(task_config("fed_aya", path=path), 0)


@pytest.mark.parametrize(
    ("content", "more", "kind", "said"),
    [
        (None, {"languages": ["en", "tel", "te"]}, ConfigError, "names a language twice: te"),
        (None, {"languages": ["en", "Telugo"]}, ConfigError, "'telugo', which no row of .*did you mean 'telugu'"),
        (None, {"unseen": [3, 38]}, DataError, "task.unseen: no client '38' among the 38 clients"),
        ({"a": aya_rows(0), "b": aya_rows(1)}, {"languages": ["en"]}, DataError, "no client '21'"),
        ({"a": 3}, {}, DataError, r"client 0 \('a'\): expected a list of rows, found int"),
        ([["x"]], {}, DataError, "client 0, row 0: a row must be an object with named fields, found str"),
        ("text", {}, DataError, "expected an object client -> list of rows"),
        ({"a": [{"instruction": "q", "response": "a"}]}, {}, DataError, r"row 0: no language; one of language, lang"),
        ({"a": [{"text": "q", "language": "en"}]}, {"languages": ["en"], "unseen": []}, DataError, "keys text, lang"),
        ({"a": aya_rows(0)[:1]}, {"languages": ["ar"], "unseen": []}, DataError, "client '00' has 1; at least 3"),
    ],
)
def test_fed_aya_refuses_bad_files_languages_and_clients(
    content: Any, more: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        fed_aya.load(aya(tmp_path, content, **more), 0)


def test_damaged_fed_aya_is_refused(tmp_path: Path) -> None:
    cfg = aya(tmp_path)
    file = tmp_path / "aya_38c_25k.json"
    file.write_text(file.read_text()[:-40])
    with pytest.raises(DataError, match=r"aya_38c_25k.json: damaged JSON"):
        fed_aya.load(cfg, 0)


# --- dolly --------------------------------------------------------------------------------------------------------


def dolly_rows(n: int, categories: Sequence[str] = DOLLY_CATEGORIES) -> list[dict[str, str]]:
    return [
        {"instruction": f"{c} {i}", "context": "", "response": f"r{i}", "category": c}
        for c in categories
        for i in range(n)
    ]


def dolly_file(folder: Path, values: Sequence[Any], **more: Any) -> TaskConfig:
    write(folder / "databricks-dolly-15k.jsonl", values)
    return task_config(**{"name": "dolly", "path": str(folder), "clients_per_language": 2, **more})


def test_dolly_deals_every_category_to_clients_of_its_own_in_both_pools(tmp_path: Path) -> None:
    data = prepare(dolly_file(tmp_path, dolly_rows(20)), 0, tmp_path / "out")
    assert [c.id for c in data.pool("seen")] == [f"seen/{c}/{i:02d}" for c in DOLLY_CATEGORIES for i in range(2)]
    assert {(c.n_train, c.n_test) for c in data.clients} == {(4, 1)}
    held = [t for c in data.clients for s in ("train", "test") for t in data.texts(c.id, s)[0]]
    assert sorted(held) == sorted(row["instruction"] for row in dolly_rows(20))
    assert all(text.startswith(c.language) for c in data.clients for text in data.texts(c.id, "train")[0])


def test_dolly_limits_a_clients_examples_exactly(tmp_path: Path) -> None:
    cfg = dolly_file(tmp_path, dolly_rows(33, DOLLY_CATEGORIES[:2]), languages=DOLLY_CATEGORIES[:2], max_examples=7)
    data = prepare(cfg, 0, tmp_path / "out")
    assert {(c.n_train, c.n_test) for c in data.clients} == {(5, 2)}


def test_dolly_drops_and_counts_repeated_and_empty_rows(tmp_path: Path) -> None:
    values = [*dolly_rows(12), *dolly_rows(1), {**dolly_rows(1)[0], "response": ""}]
    source = dolly.load(dolly_file(tmp_path, values), 0)
    assert source.notes["dropped_repeated_rows"] == 8
    assert source.notes["dropped_empty_responses"] == 1
    assert {len(p.train) + len(p.test) for pool in source.pools.values() for p in pool.values()} == {6}


@pytest.mark.parametrize(
    ("values", "more", "kind", "said"),
    [
        (
            dolly_rows(9),
            {"languages": ["open_q"]},
            ConfigError,
            "'open_q', no category of dolly.*mean 'open_qa'",
        ),
        (dolly_rows(9), {"unseen": ["x"]}, ConfigError, "'task.unseen' .* has no meaning for task=dolly"),
        ([{**dolly_rows(1)[0], "category": "poem"}], {}, DataError, "line 1: 'category' is 'poem'; allowed: brainst"),
        (dolly_rows(10), {}, DataError, "seen pool of category 'brainstorming' has 5 rows for 2 clients .*at most 1"),
    ],
)
def test_dolly_refuses_bad_categories_and_too_many_clients(
    values: list[Any], more: dict[str, Any], kind: type[Exception], said: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=said):
        dolly.load(dolly_file(tmp_path, values, **more), 0)


def test_dolly_without_a_local_copy_comes_from_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    asked = []

    def loaded(name: str, split: str) -> list[dict[str, str]]:
        asked.append((name, split))
        return dolly_rows(12)

    monkeypatch.setattr(datasets, "load_dataset", loaded)
    source = dolly.load(task_config("dolly", clients_per_language=2), 0)
    assert asked == [("databricks/databricks-dolly-15k", "train")]
    assert source.labels == DOLLY_CATEGORIES


@needs("dolly")
def test_the_real_dolly_has_15011_rows_in_8_categories(tmp_path: Path) -> None:
    data = prepare(task_config("dolly", max_examples=20), 0, tmp_path / "out")
    assert data.manifest["notes"]["rows_read"] == 15011
    assert data.manifest["notes"]["dropped_repeated_rows"] == 16
    assert len(data.clients) == 160
    assert {(c.n_train, c.n_test) for c in data.clients} == {(16, 4)}
    source = dolly.load(task_config("dolly"), 0)
    sizes = {c: sum(len(p[c].train) + len(p[c].test) for p in source.pools.values()) for c in source.labels}
    assert sum(sizes.values()) == 15011 - 16
    assert max(sizes, key=lambda c: sizes[c]) == "open_qa"
