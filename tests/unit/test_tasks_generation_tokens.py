"""Instructions as tokens on disk: what every worker reads, what was cut or dropped, and whose it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reading
from instruction_cases import byte_tokenizer

from fedtailor.core.errors import DataError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.prepare import tokens_artifact
from fedtailor.lanes.batches import make_batch
from fedtailor.tasks.encoding import Encoder, Sample
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare, task_config
from fedtailor.tasks.tokens import TokenData, tokenise

SPLITS = ("train", "test")
MAX_LENGTH = 160


def rows(client: str, n: int, words: int, group: str = "talk") -> list[dict[str, Any]]:
    return [
        {
            "client": client, "group": group,
            "instruction": f"Ask {client} {i} " + "more " * words, "response": f"Say {client} {i}.",
        }
        for i in range(n)
    ]  # fmt: skip


def task(folder: Path, values: list[dict[str, Any]]) -> TaskData:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")
    cfg = task_config("instructions", path=str(path), unseen=("new",), group_column="group")
    return prepare(cfg, 0, folder / "data")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
    asked = [*turns, {"role": "user", "content": "And now?"}, {"role": "assistant", "content": "Now this."}]
    talks = [{"client": "old", "group": "office", "messages": asked}]
    talks += [
        {"client": "old", "group": "office", "messages": [{"role": "user", "content": f"Q{i}"}, *asked[1:2]]}
        for i in range(9)
    ]
    folder = tmp_path_factory.mktemp("task")
    (folder / "talks.jsonl").write_text("", encoding="utf-8")
    mixed = rows("a", 14, 1) + rows("a", 4, 90) + rows("new", 10, 2, "rest")
    as_messages = [
        {
            "client": row["client"], "group": row["group"],
            "messages": [
                {"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["response"]},
            ],
        }
        for row in mixed
    ]  # fmt: skip
    return task(folder, as_messages + talks)


@pytest.fixture(scope="module")
def tokens(data: TaskData, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return tokenise(data, byte_tokenizer(), MAX_LENGTH, tmp_path_factory.mktemp("tokens"), "alpaca")


def samples(data: TaskData, client: str, split: Any) -> list[Sample]:
    texts, _ = data.texts(client, split)
    turns = [tuple(json.loads(history)) if history else () for history in reading.history(data, client, split)]
    return [Sample(*each) for each in zip(texts, data.pairs(client, split) or (), turns, strict=True)]


def test_every_example_is_its_templates_encoding(data: TaskData, tokens: TokenData) -> None:
    assert tokens.kind == "generation"
    found_history = 0
    for client in data.clients:
        for split in SPLITS:
            examples = tokens.examples(client.id, split)  # type: ignore[arg-type]
            assert examples.prompt_length is not None
            wanted = samples(data, client.id, split)
            found_history += sum(bool(sample.history) for sample in wanted)
            encoded = Encoder("alpaca", byte_tokenizer(), MAX_LENGTH).encode(wanted)
            for i, row in enumerate(encoded):
                assert row is not None
                assert examples.input_ids[i, : examples.lengths[i]].tolist() == row.ids.tolist()
                assert (examples.input_ids[i, examples.lengths[i] :] == tokens.pad_id).all()
                assert examples.prompt_length[i] == row.prompt_tokens
            assert examples.input_ids.dtype == examples.prompt_length.dtype == np.int64
            assert (examples.labels == data.texts(client.id, split)[1]).all()  # type: ignore[arg-type]
    assert found_history == 1


def test_questions_and_answers_are_read_from_the_tokens_alone(data: TaskData, tokens: TokenData) -> None:
    opened = TokenData.open(tokens.path)
    for client in data.clients:
        for split in SPLITS:
            assert opened.questions(client.id, split) == data.texts(client.id, split)[0]  # type: ignore[arg-type]
            assert opened.answers(client.id, split) == data.pairs(client.id, split)  # type: ignore[arg-type]


def test_the_targets_of_a_batch_are_the_responses(tokens: TokenData) -> None:
    examples = tokens.examples("unseen/rest/new", "test")
    batch = make_batch([examples], [np.arange(len(examples))], tokens.pad_id)
    texts = ["" for _ in range(len(examples))]
    for label, row, real in zip(batch.labels[0], batch.target_row[0], batch.valid[0], strict=True):  # type: ignore[index]
        if real:
            texts[int(row)] += byte_tokenizer().decode([int(label)])
    assert texts == [f" {answer}</s>" for answer in tokens.answers("unseen/rest/new", "test")]


def test_the_manifest_counts_what_was_cut_in_each_split(data: TaskData, tokens: TokenData) -> None:
    counts = tokens.manifest["overlong"]
    assert counts["rule"] == "cut_prompt"
    assert sum(counts[split]["cut_prompts"] for split in SPLITS) == 4
    for split in SPLITS:
        encoder = Encoder("alpaca", byte_tokenizer(), 10_000)
        lengths = [encoder.encode(samples(data, c.id, split)) for c in data.clients]
        long = sum(len(row.ids) > MAX_LENGTH for rows in lengths for row in rows if row)
        assert counts[split] == {"cut_prompts": long, "cut_responses": 0, "dropped": 0}
    assert tokens.manifest["template"] == "alpaca"
    assert tokens.manifest["stop_ids"] == [byte_tokenizer().eos_token_id]
    assert max(tokens.longest(c.id) for c in tokens.clients) <= MAX_LENGTH


def test_answers_may_end_with_the_templates_token_or_with_eos(data: TaskData, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    made = tokenise(data, tokenizer, MAX_LENGTH, tmp_path)
    assert made.manifest["template"] == "chat"
    assert made.manifest["stop_ids"] == sorted(tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>"]))


def test_dropped_examples_leave_their_clients(data: TaskData, tokens: TokenData, tmp_path: Path) -> None:
    dropped = tokenise(data, byte_tokenizer(), MAX_LENGTH, tmp_path, "alpaca", "drop")
    counts = dropped.manifest["overlong"]
    assert sum(counts[split]["dropped"] for split in SPLITS) == 4
    assert all(counts[split]["cut_prompts"] == 0 for split in SPLITS)
    for split in SPLITS:
        for client in data.clients:
            keep = [q for q in tokens.questions(client.id, split) if q.count("more") < 90]  # type: ignore[arg-type]
            assert dropped.questions(client.id, split) == keep  # type: ignore[arg-type]
            examples = dropped.examples(client.id, split)  # type: ignore[arg-type]
            now = dropped.client(client.id)
            assert len(examples) == len(keep) == (now.n_train if split == "train" else now.n_test)
            assert examples.lengths.min() > 0
    assert dropped.hash != tokens.hash


def test_a_client_with_only_over_long_examples_is_named(tmp_path: Path) -> None:
    made = task(tmp_path, rows("a", 10, 1) + rows("long", 10, 90) + rows("new", 10, 1))
    message = r"client 'seen/talk/long': all 8 train examples exceed 'task.max_length' = 160 tokens"
    with pytest.raises(DataError, match=message):
        tokenise(made, byte_tokenizer(), MAX_LENGTH, tmp_path / "tokens", "alpaca", "drop")
    kept = tokenise(made, byte_tokenizer(), MAX_LENGTH, tmp_path / "kept", "alpaca")
    assert kept.client("seen/talk/long").n_train == 8


def test_equal_input_gives_equal_bytes_and_the_hash_knows_the_template(
    data: TaskData, tokens: TokenData, tmp_path: Path
) -> None:
    again = tokenise(data, byte_tokenizer(), MAX_LENGTH, tmp_path / "again", "alpaca")
    for name in ("manifest.json", "tokens.arrow", "answers.arrow", "examples.arrow"):
        assert (again.path / name).read_bytes() == (tokens.path / name).read_bytes()
    assert tokenise(data, byte_tokenizer(), MAX_LENGTH, tmp_path / "llama3", "llama3").hash != tokens.hash


def test_a_missing_file_of_answers_is_named(data: TaskData, tmp_path: Path) -> None:
    tokenise(data, byte_tokenizer(), MAX_LENGTH, tmp_path)
    (tmp_path / "answers.arrow").unlink()
    with pytest.raises(DataError, match=r"answers\.arrow"):
        TokenData.open(tmp_path)


def test_tokens_are_named_by_template_and_rule_where_instructions_are_meant(tmp_path: Path) -> None:
    def name(*overrides: str) -> str:
        return tokens_artifact(compose([], [f"storage={tmp_path}", *overrides]), "data", "model")

    assert name("task=cldr") == name("task=cldr", "task.template=alpaca")
    makes = ["task=cldr_instruct", "model=tiny-llama"]
    names = [name(*makes, *more) for more in ([], ["task.template=alpaca"], ["task.overlong=drop"])]
    assert len(set(names)) == 3
    file = tmp_path / "mine.txt"
    file.write_text("{instruction} {response}", encoding="utf-8")
    first = name(*makes, f"task.template={file}")
    file.write_text("{instruction}: {response}", encoding="utf-8")
    assert first != name(*makes, f"task.template={file}")
