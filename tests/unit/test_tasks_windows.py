"""Questions as windows of tokens: their spans are the answers' characters, in every window that has room for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from squad_case import squad_tree, write_squad

from fedtailor.core.errors import DataError, ModelError
from fedtailor.models.embedded import build_wordpiece
from fedtailor.tasks.squad import place_of
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare, task_config
from fedtailor.tasks.tokens import TokenData, tokenise
from fedtailor.tasks.unknown_tokens import unknown_tokens
from fedtailor.tasks.windows import check_windows, encode_windows

LENGTH, STRIDE = 32, 8


def case(folder: Path, tree: dict[str, Any] | None = None, **given: Any) -> tuple[TaskData, Any, Any]:
    cfg = task_config("squad", path=str(write_squad(folder / "train-v2.0.json", tree)), subset="v2", **given)
    data = prepare(cfg, 42, folder / "data")
    return data, build_wordpiece(data.train_texts(), 300, LENGTH), cfg


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TaskData, TokenData, Any]:
    folder = tmp_path_factory.mktemp("windows")
    data, tokenizer, _ = case(folder)
    return data, tokenise(data, tokenizer, LENGTH, folder / "tokens", stride=STRIDE), tokenizer


def test_a_span_is_its_answers_text(made: tuple[TaskData, TokenData, Any]) -> None:
    data, tokens, tokenizer = made
    found = {"here": 0, "elsewhere": 0, "none": 0}
    for client in tokens.clients:
        examples, rows = tokens.examples(client.id, "test"), tokens.rows_of(client.id, "test")
        assert (tokens.texts_of(rows) == np.sort(tokens.texts_of(rows))).all() or len(rows)
        for question in tokens.asked(client.id):
            hits = 0
            for row, start, characters in zip(question.rows, question.starts, question.characters, strict=True):
                first, last = examples.spans[row]
                if not last:
                    assert first == 0
                    found["elsewhere" if question.answers else "none"] += 1
                    continue
                text = question.context[characters[first - start, 0] : characters[last - start, 1]]
                assert text == question.answers[0]
                assert examples.input_ids[row, first : last + 1].tolist() == tokenizer.encode(
                    text, add_special_tokens=False
                )
                hits += 1
            assert bool(hits) == bool(question.answers)
            found["here"] += hits
            # All tokens of the context are in some window, two neighbours share STRIDE of them.
            ends = [characters[-1, 1] for characters in question.characters]
            assert ends == sorted(ends)
            for a, b in zip(question.characters, question.characters[1:], strict=False):
                assert np.array_equal(a[-STRIDE:], b[:STRIDE])
    assert min(found.values()) > 0
    assert tokens.manifest["unanswerable"]
    assert tokens.manifest["answers_in_no_window"] == 0
    assert sum(c.n_train for c in tokens.clients) > sum(c.n_train for c in data.clients), (
        "some are longer than a window"
    )


def test_windows_are_at_most_as_long_as_they_may_be_and_begin_with_the_question(made: tuple[Any, Any, Any]) -> None:
    data, tokens, tokenizer = made
    client = tokens.clients[0].id
    examples = tokens.examples(client, "train")
    texts = [text for text, *_ in zip(data.texts(client, "train")[0], strict=True)]
    numbers = tokens.texts_of(tokens.rows_of(client, "train"))
    of_row = dict(zip(data.rows_of(client, "train").tolist(), texts, strict=True))
    assert examples.lengths.max() == LENGTH
    for ids, first, number in zip(examples.input_ids, examples.first_segment_length, numbers.tolist(), strict=True):
        assert ids[:first].tolist() == tokenizer(of_row[number])["input_ids"]


def test_names_of_special_tokens_move_no_answer() -> None:
    context = "[SEP] the [CLS] river [MASK] ends in Essen [SEP] ."
    tokenizer = build_wordpiece([context, "where ?"], 200, 80)
    at = context.index("Essen")
    [window] = encode_windows(tokenizer, ["where ?"], [context], [(at, at + 5)], 80, 4)
    first, last = window.span
    own = window.characters[[first - window.context, last - window.context]]
    assert context[own[0, 0] : own[1, 1]] == "Essen"
    assert not {tokenizer.mask_token_id} & set(window.ids.tolist())


def test_unknown_tokens_are_counted_over_windows(made: tuple[Any, Any, Any]) -> None:
    data, tokens, tokenizer = made
    [(group, (unknown, total))] = unknown_tokens(data, tokens, tokenizer).items()
    special = set(tokenizer.all_special_ids)
    every = [tokens.examples(c.id, split) for c in tokens.clients for split in ("train", "test")]
    counted = sum(int((~np.isin(e.input_ids, list(special))).sum()) for e in every)
    assert (group, unknown) == ("squad2", 0)
    assert total == counted


def long_tree(answer: str, question: str = "who ?") -> dict[str, Any]:
    tree = squad_tree()
    context = "so " * 30 + answer
    entry = {"id": "long-one", "question": question, "answers": [{"text": answer, "answer_start": 90}]}
    tree["data"][0]["paragraphs"].append({"context": context, "qas": [entry]})
    return tree


def test_answers_longer_than_a_window_are_refused_by_place(tmp_path: Path) -> None:
    data, tokenizer, cfg = case(tmp_path, long_tree("a b c d e f g h " * 5))
    with pytest.raises(DataError, match=r"question long-one: its answer is longer .*\(25 tokens\); 1 of .*max_length"):
        tokenise(
            data, tokenizer, LENGTH, tmp_path / "t", stride=STRIDE, place_of=lambda example: place_of(cfg, example)
        )


def test_answers_between_two_windows_are_counted(tmp_path: Path) -> None:
    data, tokenizer, _ = case(tmp_path, long_tree("a b c d e f g h i j k l m n o p q r s t"))
    tokens = tokenise(data, tokenizer, LENGTH, tmp_path / "t", stride=2)
    assert tokens.manifest["answers_in_no_window"] == 1


def test_questions_that_leave_no_room_are_refused_by_place(tmp_path: Path) -> None:
    data, tokenizer, cfg = case(tmp_path, long_tree("Essen", "why " * 25))
    with pytest.raises(
        DataError, match=r"question long-one: its question leaves \d+ tokens .*'task.stride' \(8\) must be below; 1 of"
    ):
        tokenise(
            data, tokenizer, LENGTH, tmp_path / "t", stride=STRIDE, place_of=lambda example: place_of(cfg, example)
        )


def test_tokenizers_that_cannot_serve_are_refused(made: tuple[Any, Any, Any]) -> None:
    tokenizer = made[2]
    with pytest.raises(ModelError, match=r"'task.stride' \(28\) leaves no room.*allowed: 0 ... 27"):
        check_windows(tokenizer, LENGTH, 28)
    check_windows(tokenizer, LENGTH, 27)
    for wrong, told in (({"is_fast": False}, "give a fast one"), ({"cls_token_id": None}, "no token of its own")):
        fake = type("Fake", (), {"name_or_path": "some", "is_fast": True, **wrong})()
        with pytest.raises(ModelError, match=told):
            check_windows(fake, LENGTH, 8)


def test_equal_data_give_equal_bytes(made: tuple[Any, Any, Any], tmp_path: Path) -> None:
    data, tokens, tokenizer = made
    again = tokenise(data, tokenizer, LENGTH, tmp_path / "again", stride=STRIDE)
    assert again.hash == tokens.hash
    other = tokenise(data, tokenizer, LENGTH, tmp_path / "other", stride=STRIDE + 1)
    assert other.hash != tokens.hash
    assert json.loads((tmp_path / "again" / "manifest.json").read_text())["stride"] == STRIDE
