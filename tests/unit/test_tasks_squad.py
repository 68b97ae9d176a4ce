"""SQuAD as questions of clients: files, versions, split, topics, answers that are not where they should be."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from squad_case import ARTICLES, squad_tree, write_squad

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks import squad
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.rows import Row
from fedtailor.tasks.source import Source
from fedtailor.tasks.task import prepare, task_config

TREE = squad_tree(6)
ENTRIES = [entry for article in TREE["data"] for part in article["paragraphs"] for entry in part["qas"]]


def load(path: Path, **given: Any) -> Source:
    return squad.load(task_config("squad", path=str(path), **given), 42)


def parts(source: Source) -> dict[str, list[Any]]:
    [(pool, group, part)] = [p for p in source.parts() if p[0] == "seen"]
    assert pool == "seen"
    return {"group": [group], "train": list(part.train), "test": list(part.test)}


def test_versions_split_and_topics(tmp_path: Path) -> None:
    file = write_squad(tmp_path / "any-name.json.gz", TREE)
    there = [entry for entry in ENTRIES if entry["answers"]]
    for version, wanted in (("v1", there), ("v2", ENTRIES)):
        for place in (file, tmp_path):  # a folder with one file
            source = load(place, subset=version)
            assert (source.kind, source.labels) == ("extraction", ARTICLES)
            every = [e for _, _, part in source.parts() for e in [*part.train, *part.test]]
            assert sorted(e.text for e in every) == sorted(entry["question"] for entry in wanted)
            tests = [e for _, _, part in source.parts() for e in part.test]
            assert len(tests) == round(0.2 * len(wanted))
            for e in every:
                for span in json.loads(e.answers):
                    assert e.pair[span["start"] :].startswith(span["text"])
        assert {group for _, group, _ in source.parts()} == {f"squad{version[1]}"}
    assert any(not json.loads(e.answers) for e in every), "v2 has questions without an answer"


def test_four_clients_of_sorted_titles(tmp_path: Path) -> None:
    cfg = task_config("squad", path=str(write_squad(tmp_path / "train-v2.0.json", TREE)), subset="v2")
    assert (cfg.clients_per_language, cfg.sorted_share, cfg.max_length, cfg.stride) == (4, 0.5, 384, 128)
    data = prepare(cfg, 42, tmp_path / "data")
    assert [client.id for client in data.clients] == [f"seen/squad2/0{k}" for k in range(4)]
    train = np.array([client["train_classes"] for client in data.manifest["clients"]])
    assert max(train.sum(1)) - min(train.sum(1)) <= 1
    assert all(own.argmax() == k for k, own in enumerate(train)), "the sorted half is in blocks, one title each here"
    alone = prepare(cfg.model_copy(update={"sorted_share": 1.0}), 42, tmp_path / "sorted")
    blocks = [set(np.flatnonzero(client["train_classes"])) for client in alone.manifest["clients"]]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(blocks))
    assert alone.hash != data.hash


def test_the_train_part_comes_before_other_files(tmp_path: Path) -> None:
    write_squad(tmp_path / "dev-v2.0.json", squad_tree(1))
    with pytest.raises(ConfigError, match="names no version of squad"):
        load(tmp_path, subset="cola")
    write_squad(tmp_path / "other.json", TREE)
    with pytest.raises(DataError, match=r"task.path: .* holds no train-v2.0.json.*several JSON files.*give one"):
        load(tmp_path, subset="v2")
    write_squad(tmp_path / "train-v2.0.json.gz", TREE)
    assert len(parts(load(tmp_path, subset="v2"))["train"]) > len(ENTRIES) / 3
    with pytest.raises(DataError, match="no JSON file"):
        load(tmp_path / "nothing")


def test_answers_that_are_not_in_their_context_are_named_counted_and_dropped(tmp_path: Path) -> None:
    tree = squad_tree(6)
    entries = [e for article in tree["data"] for part in article["paragraphs"] for e in part["qas"] if e["answers"]]
    entries[0]["answers"][0]["text"] = "nowhere at all"
    entries[1]["answers"][0]["answer_start"] += 3  # in the context, but elsewhere
    entries[2]["answers"].append({"text": "Atlantis", "answer_start": 0})
    source = load(write_squad(tmp_path / "train-v2.0.json", tree), subset="v1")
    told = source.notes["dropped_not_in_context"]
    assert told == f"1, {tmp_path / 'train-v2.0.json'}, question {entries[0]['id']}"
    assert str(told) in squad.dropped_sentence(source.notes)
    held = [e for _, _, part in source.parts() for e in [*part.train, *part.test]]
    assert len(held) == len(entries) - 1
    assert all(e.pair[a["start"] :].startswith(a["text"]) for e in held for a in json.loads(e.answers))
    assert not squad.dropped_sentence(load(write_squad(tmp_path / "b" / "x.json", TREE)).notes)


def test_a_question_is_found_again_for_messages(tmp_path: Path) -> None:
    cfg = task_config("squad", path=str(write_squad(tmp_path / "train-v2.0.json", TREE)))
    example = parts(squad.load(cfg, 42))["train"][3]
    where = squad.place_of(cfg, example)
    [entry] = [e for e in ENTRIES if where.endswith(f"question {e['id']}")]
    assert entry["question"] == example.text


@pytest.mark.parametrize(
    ("tree", "told"),
    [
        ({"rows": []}, "no list 'data'"),
        ({"data": [{"title": "a"}]}, "article 'a': no list 'paragraphs'"),
        ({"data": [{"title": "a", "paragraphs": [{"qas": [{"id": "7", "question": "x"}]}]}]}, "question 7: no list"),
        (
            {"data": [{"title": "a", "paragraphs": [{"qas": [{"id": "7", "question": "x", "answers": [{}]}]}]}]},
            "question 7: needs 'question', 'context'",
        ),
        ({"data": []}, "no question with an answer"),
    ],
)
def test_files_that_are_not_squads_are_refused_by_place(tmp_path: Path, tree: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load(write_squad(tmp_path / "x.json", tree))


def test_the_hub_is_asked_where_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    asked = []

    def rows(name: str, split: str) -> list[Row]:
        asked.append((name, split))
        answers = {"text": ["Rome"], "answer_start": [7]}
        return [
            Row(
                f"row {k}",
                {"title": f"t{k % 2}", "question": f"q{k}", "context": f"I love Rome{k}", "answers": answers},
            )
            for k in range(20)
        ]

    monkeypatch.setattr(squad, "hub_rows", rows)
    source = squad.load(TaskConfig(**{**squad.ENTRY.defaults, "name": "squad", "subset": "v2"}), 42)
    assert asked == [("rajpurkar/squad_v2", "train")]
    assert source.labels == ("t0", "t1")
    with pytest.raises(ConfigError, match="English alone"):
        squad.load(task_config("squad", languages=("fra",)), 42)
