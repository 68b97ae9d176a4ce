"""A task whose clients the data names, and whose examples are instructions: what is stored, kept and refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import reading

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.prepare import make_inputs
from fedtailor.experiment.rules import check_population
from fedtailor.storage.artifacts import Artifacts
from fedtailor.storage.files import Storage
from fedtailor.tasks import task
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Example, LanguagePool, NaturalClient, Pool, Source, TaskEntry
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare

GROUPS = ("en", "sw")
HISTORY = '[{"role": "user", "content": "Jambo"}, {"role": "assistant", "content": "Jambo!"}]'


def client(name: str, pool: Pool = "seen", language: str = "en", train: int = 3, test: int = 2) -> NaturalClient:
    def examples(split: str, n: int) -> tuple[Example, ...]:
        # Every third example is of the other group, and goes on from a conversation.
        return tuple(
            Example(
                f"{name} asks {split} {i}?",
                int(i % 3 == 2),
                f"{name} says {split} {i}.",
                HISTORY if i % 3 == 2 else None,
            )
            for i in range(n)
        )

    return NaturalClient(name, pool, language, examples("train", train), examples("test", test))


def source(*natural_clients: NaturalClient, **changes: Any) -> Source:
    return replace(Source(GROUPS, kind="generation", natural_clients=natural_clients), **changes)


def config(monkeypatch: pytest.MonkeyPatch, made: Source, **changes: Any) -> TaskConfig:
    monkeypatch.setitem(task.TASKS, "toy", TaskEntry(lambda cfg, seed: made, "generation"))
    return TaskConfig(name="toy", **changes)


def stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, made: Source, **changes: Any) -> TaskData:
    return prepare(config(monkeypatch, made, **changes), 0, tmp_path / "data")


SOME = source(client("b"), client("z", "unseen", "sw"), client("a", train=5, test=4))


def test_clients_keep_the_order_of_the_data_with_the_seen_ones_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = stored(monkeypatch, tmp_path, SOME)
    assert [c.id for c in data.clients] == ["seen/en/b", "seen/en/a", "unseen/sw/z"]
    assert [(c.n_train, c.n_test) for c in data.clients] == [(3, 2), (5, 4), (3, 2)]
    assert data.client("unseen/sw/z").language == "sw"


def test_a_client_holds_its_own_examples_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = stored(monkeypatch, tmp_path, SOME)
    texts, groups = data.texts("seen/en/a", "test")
    assert texts == [f"a asks test {i}?" for i in range(4)]
    assert groups.tolist() == [0, 0, 1, 0]
    assert data.pairs("seen/en/a", "test") == [f"a says test {i}." for i in range(4)]
    assert reading.history(data, "seen/en/a", "test") == [None, None, HISTORY, None]


def test_the_manifest_says_generation_and_counts_each_client_by_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = stored(monkeypatch, tmp_path, SOME)
    assert (data.kind, data.labels, data.manifest["kind"]) == ("generation", GROUPS, "generation")
    entry = data.manifest["clients"][1]
    assert (entry["id"], entry["train_classes"], entry["test_classes"]) == ("seen/en/a", [4, 1], [3, 1])
    assert data.manifest["class_counts"]["seen/en/train"] == [6, 2]
    assert data.manifest["languages"] == ["en", "sw"]


def test_the_table_has_the_response_the_history_and_the_group_of_each_example(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    batch = stored(monkeypatch, tmp_path, SOME).batches[0]
    assert batch.schema.names == ["pool", "language", "split", "text", "label", "pair", "history"]
    assert batch.schema.field("history").type == pa.large_string()
    assert batch.slice(2, 1).to_pylist() == [
        {
            "pool": "seen", "language": "sw", "split": "train", "text": "b asks train 2?", "label": 1,
            "pair": "b says train 2.", "history": HISTORY,
        }
    ]  # fmt: skip


def test_a_vocabulary_is_made_of_instructions_and_responses_of_seen_clients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = list(stored(monkeypatch, tmp_path, SOME).train_texts())
    assert texts[:2] == ["b asks train 0?", "b says train 0."]
    assert len(texts) == 2 * (3 + 5)


def test_classification_has_no_kind_in_its_manifest_and_no_responses(tmp_path: Path) -> None:
    data = prepare(TaskConfig(languages=("eng",), clients_per_language=2), 0, tmp_path)
    assert data.kind == "classification"
    assert not {"kind", "unseen", "template"} & {*data.manifest, *data.manifest["config"]}
    assert data.pairs("seen/eng/00", "train") is None


def test_equal_sources_give_equal_bytes_and_any_change_another_hash(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one, two = (prepare(config(monkeypatch, SOME), 0, tmp_path / name) for name in ("one", "two"))
    for name in ("manifest.json", "texts.arrow", "examples.arrow"):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()
    first = SOME.natural_clients[0]
    hashes = {one.hash}
    for change in ({"pair": "other"}, {"text": "other?"}, {"label": 1}, {"history": HISTORY}):
        train = (first.train[0]._replace(**change), *first.train[1:])
        made = source(replace(first, train=train), *SOME.natural_clients[1:])
        hashes.add(reading.fingerprint(config(monkeypatch, made), 0))
    hashes.add(reading.fingerprint(config(monkeypatch, source(replace(first, name="c"), *SOME.natural_clients[1:])), 0))
    assert len(hashes) == 6


@pytest.mark.parametrize(("kept", "seen", "unseen"), [(10, 8, 3), (5, 4, 2), (2, 2, 1), (1, 1, 1)])
def test_the_first_share_of_each_pool_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: int, seen: int, unseen: int
) -> None:
    made = source(*(client(f"s{i}") for i in range(8)), *(client(f"u{i}", "unseen") for i in range(3)))
    data = stored(monkeypatch, tmp_path, made, clients_per_language=10, clients_kept=kept)
    assert [c.id for c in data.pool("seen")] == [f"seen/en/s{i}" for i in range(seen)]
    assert [c.id for c in data.pool("unseen")] == [f"unseen/en/u{i}" for i in range(unseen)]


def test_instructions_that_are_dealt_to_clients_are_stored_alike(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = LanguagePool(
        [Example(f"q{i}", 0, f"a{i}") for i in range(6)], [Example(f"t{i}", 0, f"b{i}") for i in range(4)]
    )
    other = LanguagePool(
        [Example(f"Q{i}!", 0, f"A{i}") for i in range(6)], [Example(f"T{i}!", 0, "B") for i in range(4)]
    )
    pools = {"seen": {"qa": part}, "unseen": {"qa": other}}
    made = Source(("qa",), pools, kind="generation")  # type: ignore[arg-type]
    data = stored(monkeypatch, tmp_path, made, clients_per_language=2, languages=("qa",))
    assert [c.id for c in data.clients] == ["seen/qa/00", "seen/qa/01", "unseen/qa/00", "unseen/qa/01"]
    held = [data.texts(c, "train")[0] for c in ("seen/qa/00", "seen/qa/01")]
    assert sorted(held[0] + held[1]) == [f"q{i}" for i in range(6)]
    assert data.pairs("seen/qa/00", "train") == ["a" + text[1:] for text in held[0]]
    assert reading.history(data, "seen/qa/00", "test") == [None, None]


# ---- leaks -------------------------------------------------------------------------------------------------


def leaky() -> Source:
    known = client("a").train[0]
    same = known._replace(text=known.text.upper(), label=1, history=HISTORY)
    return source(
        replace(client("a"), test=(same, *client("a").test)),
        replace(client("z", "unseen"), train=(known, *client("z").train)),
        replace(client("b"), test=(known._replace(pair="another answer"), *client("b").test)),
    )


def test_an_instruction_with_its_response_in_two_places_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    notes = stored(monkeypatch, tmp_path, leaky()).manifest["notes"]
    assert notes["leak_seen_unseen"] == 1
    assert notes["leak_seen_train_test"] == 1
    assert notes["leak_unseen_train_test"] == 0


def test_a_source_that_promises_no_leak_is_held_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="texts leak between pools or splits"):
        reading.fingerprint(config(monkeypatch, replace(leaky(), disjoint=True)), 0)


# ---- refused -----------------------------------------------------------------------------------------------

BAD = {
    "few train": (
        source(client("ok"), client("poor", train=1)),
        r"client 'seen/en/poor' has 1 train and 2 test .* 2 and 1",
    ),
    "no test": (source(client("ok"), client("poor", test=0)), r"client 'seen/en/poor' has 3 train and 0 test"),
    "none seen": (source(client("a", "unseen"), client("b", "unseen")), r"all 2 clients are unseen.*task.unseen"),
    "twice": (source(client("a"), client("a")), r"client 'seen/en/a': 2 clients have this id"),
    "slash": (source(client("a/b")), r"client 'seen/en/a/b': .* have a slash"),
    "no response": (
        source(client("a"), replace(client("b"), test=(*client("b").test, Example("q", 0, " \n")))),
        r"client 'seen/en/b': test example 3 has no response",
    ),
    "no instruction": (
        source(replace(client("b"), train=(Example("", 0, "r"), *client("b").train))),
        r"client 'seen/en/b': train example 1 has no instruction",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_trained_or_judged_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made, message = BAD[name]
    with pytest.raises(DataError, match=message):
        reading.fingerprint(config(monkeypatch, made), 0)


def test_one_group_is_enough(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert stored(monkeypatch, tmp_path, source(client("a", train=2, test=1))).manifest["rows"] == 3


@pytest.mark.parametrize(("key", "value"), [("resample", 20), ("reference_unseen_partition", True)])
def test_keys_that_deal_texts_are_refused_where_clients_have_their_own(
    monkeypatch: pytest.MonkeyPatch, key: str, value: int
) -> None:
    with pytest.raises(ConfigError, match=f"'task.{key}' deals texts to clients, and the clients of task 'toy' hold"):
        reading.fingerprint(config(monkeypatch, SOME, **{key: value}), 0)


# ---- cohorts -----------------------------------------------------------------------------------------------


def test_a_cohort_is_checked_once_the_data_tells_how_many_clients_there_are() -> None:
    exp = compose([], ["task=fed_aya", "task.path=nowhere", "base.cohort=12", "strategy.cohort=0.05"])
    check_population(exp, 50)
    with pytest.raises(ConfigError, match="12 clients asked, the seen pool has 7") as caught:
        check_population(exp, 7)
    assert "'strategy.cohort': 0.05 of 7 seen clients is nobody" in str(caught.value)


def test_a_cohort_above_the_clients_of_the_data_ends_before_a_model_is_made(tmp_path: Path) -> None:
    rows = [{"client": f"c{i % 3}", "instruction": f"q{i}", "response": f"r{i}"} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    given = ["task=instructions", f"task.path={tmp_path}/rows.jsonl", "task.unseen=[c2]", f"storage={tmp_path}/runs"]
    exp = compose([], [*given, "base.cohort=3", "strategy.cohort=2"])
    with pytest.raises(ConfigError, match=r"'base\.cohort': 3 clients asked, the seen pool has 2") as caught:
        make_inputs(exp, 0, Artifacts(Storage(exp.storage), "run"))
    assert "strategy" not in str(caught.value)
    assert not list((tmp_path / "runs/artifacts").glob("*-*"))


def test_a_cohort_of_a_task_that_makes_its_clients_is_checked_before_any_data() -> None:
    with pytest.raises(ConfigError, match=r"'base\.cohort': 7 clients asked, the seen pool has 6"):
        compose([], ["task=cldr_instruct", "task.languages=[eng,swa]", "task.clients_per_language=3", "base.cohort=7"])
