"""`fedtailor pretrain`: which texts, how they become rows, the loop, resuming, and the preset `mini-mbert`."""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import BertForMaskedLM
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.cli.views import PretrainView
from fedtailor.core.errors import ConfigError, DataError, Interrupted, ModelError, StorageError
from fedtailor.core.seeding import torch_rng
from fedtailor.core.settings import ModelConfig
from fedtailor.models import embedded, hub, pretrain_data, source
from fedtailor.models.load import load_classifier, load_tokenizer
from fedtailor.models.pretrain import TENSORS, Position, guess, load, pretrain, save
from fedtailor.models.pretrain_data import Corpus, gather, vocabulary_texts
from fedtailor.models.pretrain_learner import (
    Learner,
    PretrainOptions,
    choose_precision,
    chosen,
    learning_rate,
    special_ids,
)
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Source, TaskEntry
from fedtailor.tasks.task import TASKS

WORDS = (
    "sun", "moon", "star", "rain", "wind", "cloud", "snow", "ice", "fire", "sea",
    "ሰላም", "ዓለም", "मौसम", "सूरज", "ท้องฟ้า", "天", "气", "طقس",
)  # fmt: skip
TINY = {
    "tasks": ["toy"], "layers": 1, "hidden_size": 16, "heads": 2, "intermediate_size": 24, "max_position": 32,
    "vocab_size": 200, "block": 16, "batch": 4, "steps": 6, "learning_rate": 5e-3, "held_out": 0.1,
    "precision": "float32", "device": "cpu",
}  # fmt: skip


def sentence(language: str, number: int) -> str:
    draws = np.random.default_rng([number, len(language), ord(language[0])])
    return " ".join([f"{language}{number}", *(WORDS[i] for i in draws.integers(0, len(WORDS), 10))])


def toy_source(cfg: TaskConfig, seed: int) -> Source:
    """Language `big` has 40 train texts, `low` 6; one train text of each pool is a test text of the other."""
    pools: dict[Any, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for language, size in (("big", 40), ("low", 6)):
        order = np.random.default_rng(seed).permutation(size)
        texts = [Example(sentence(language, i), 0) for i in order]
        tests = [Example(sentence(language, 1000 + i), 1) for i in range(2)]
        leaked = Example(sentence(language, 0).upper(), 1)
        pools["seen"][language] = LanguagePool(texts[::2], [*tests[:1], leaked])
        pools["unseen"][language] = LanguagePool(texts[1::2], tests[1:])
    return Source(("a", "b"), pools)


def pairs_source(cfg: TaskConfig, seed: int) -> Source:
    rows = [("one premise", "first"), ("one premise", "second"), ("two premise", "first"), ("three", "hidden text")]
    train = [Example(text, 0, pair) for text, pair in rows]
    test = [Example("other", 1, "Hidden  TEXT")]
    return Source(("a", "b"), {"seen": {"en": LanguagePool(train, test)}, "unseen": {"en": LanguagePool([], [])}})


@pytest.fixture(autouse=True)
def toy_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, source_of in {"toy": toy_source, "pairs": pairs_source}.items():
        monkeypatch.setitem(TASKS, name, TaskEntry(source_of, "classification"))  # type: ignore[arg-type]


def options(**changes: Any) -> PretrainOptions:
    return chosen({**TINY, **changes})


def silent(_: Mapping[str, Any]) -> None: ...


def make(out: Path, stop: Callable[[], bool] = lambda: False, every: int = 2, **changes: Any) -> bool:
    return pretrain(options(**changes), out, every, silent, stop)


def stop_after(calls: int) -> Callable[[], bool]:
    left = iter([False] * (calls - 1) + [True])
    return lambda: next(left)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pretrain") / "base"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TASKS, "toy", TaskEntry(toy_source, "classification"))  # type: ignore[arg-type]
        assert make(out)
    return out


def every_text(corpus: Corpus) -> Counter[str]:
    return Counter(t for part in (corpus.train, corpus.held_out) for docs in part.values() for d in docs for t in d)


# The corpus


def test_the_corpus_is_every_train_text_of_both_pools_once_without_those_that_are_test_texts() -> None:
    corpus = gather(["toy"], 0.1, 1)
    expected = {sentence(language, i) for language, n in (("big", 40), ("low", 6)) for i in range(1, n)}
    assert every_text(corpus) == Counter(expected)
    assert corpus.dropped_test == 2  # sentence 0 of each language, however it is written


def test_the_seed_decides_the_order_and_what_is_held_out_but_not_the_texts() -> None:
    first, second = gather(["toy"], 0.1, 1), gather(["toy"], 0.1, 2)
    assert every_text(first) == every_text(second)
    assert first.held_out != second.held_out
    assert first.sha256 == gather(["toy"], 0.1, 1).sha256 != second.sha256


def test_held_out_documents_are_a_share_of_each_language_and_never_trained_on() -> None:
    corpus = gather(["toy"], 0.1, 1)
    assert {stream: len(docs) for stream, docs in corpus.held_out.items()} == {"toy/big": 4, "toy/low": 1}
    assert not {d for docs in corpus.held_out.values() for d in docs} & {
        d for docs in corpus.train.values() for d in docs
    }


def test_a_premise_stands_once_with_all_its_hypotheses_and_test_hypotheses_are_dropped() -> None:
    corpus = gather(["pairs"], 0.01, 1)
    documents = {*corpus.train["pairs/en"], *corpus.held_out["pairs/en"]}
    assert documents == {("one premise", "first", "second"), ("two premise",), ("three",)}
    assert (corpus.dropped_test, corpus.dropped_repeated) == (1, 1)


def test_small_languages_weigh_more_in_the_vocabulary_the_smaller_alpha_is() -> None:
    documents = {"big": [("x" * 900,)], "low": [("y" * 9,)]}
    counts = {alpha: Counter(text[0] for text in vocabulary_texts(documents, alpha)) for alpha in (1.0, 0.5, 0.0)}
    assert counts == {1.0: {"x": 1, "y": 1}, 0.5: {"x": 1, "y": 10}, 0.0: {"x": 1, "y": 100}}


@pytest.mark.data
@pytest.mark.skipif(
    "FEDTAILOR_DATA" not in os.environ,
    reason="set FEDTAILOR_DATA to a folder that holds masakhanews/ to read the real train texts",
)
def test_of_xnli_all_premises_of_the_train_file_are_read_whatever_the_seed() -> None:
    first, second = gather(["xnli"], 0.01, 1), gather(["xnli"], 0.01, 2)
    assert every_text(first) == every_text(second)
    assert len(first.train) == 15
    assert min(len(first.train[s]) + len(first.held_out[s]) for s in first.train) > 1600


# Rows


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return embedded.build_wordpiece([sentence("big", i) for i in range(40)], 200, 32)


def test_rows_begin_with_cls_and_hold_the_texts_one_after_another_with_sep_between(tokenizer: Any) -> None:
    documents = [(sentence("big", 1), sentence("big", 2)), (sentence("big", 3),)]
    rows = pretrain_data.pack(documents, tokenizer, 8)
    assert rows.dtype == np.int32
    assert set(rows[:, 0]) == {tokenizer.cls_token_id}
    flat: list[int] = []
    for number in (1, 2, 3):
        flat += [*tokenizer(sentence("big", number), add_special_tokens=False)["input_ids"], tokenizer.sep_token_id]
    assert rows[:, 1:].ravel().tolist() == flat[: rows[:, 1:].size]
    assert len(flat) - rows[:, 1:].size < 7


def test_a_stream_shorter_than_a_row_is_padded_and_an_empty_one_has_no_row(tokenizer: Any) -> None:
    rows = pretrain_data.pack([("sun",)], tokenizer, 16)
    assert rows.shape == (1, 16)
    assert (rows == tokenizer.pad_token_id).sum() > 0
    assert pretrain_data.pack([], tokenizer, 16).shape == (0, 16)


def numbered(**sizes: int) -> dict[str, pretrain_data.Rows]:
    return {name: np.arange(n, dtype=np.int32)[:, None] for name, n in sizes.items()}


def test_a_stream_gives_each_row_once_before_it_gives_one_twice_in_another_order() -> None:
    sampler = pretrain_data.Sampler(numbered(a=20), 0.5, 10, 7)
    draws = np.concatenate([sampler.next(step) for step in range(4)]).ravel().tolist()
    assert sorted(draws[:20]) == sorted(draws[20:]) == list(range(20))
    assert draws[:20] != draws[20:]


def test_streams_are_drawn_in_proportion_to_size_to_the_power_alpha() -> None:
    sizes = numbered(big=900, low=100)
    probabilities = {alpha: pretrain_data.Sampler(sizes, alpha, 1, 1).probabilities()[1] for alpha in (1.0, 0.5, 0.0)}
    assert probabilities == pytest.approx({1.0: 0.1, 0.5: 0.25, 0.0: 0.5})
    sampler = pretrain_data.Sampler(sizes, 0.5, 100, 1)
    for step in range(20):
        sampler.next(step)
    assert sampler.drawn["low"] / 2000 == pytest.approx(0.25, abs=0.03)


def test_a_sampler_goes_on_from_the_counts_it_had() -> None:
    rows = numbered(a=7, b=30)
    whole = pretrain_data.Sampler(rows, 0.5, 8, 3)
    expected = [whole.next(step) for step in range(6)]
    half = pretrain_data.Sampler(rows, 0.5, 8, 3)
    for step in range(3):
        half.next(step)
    later = pretrain_data.Sampler(rows, 0.5, 8, 3, dict(half.drawn))
    assert all(np.array_equal(later.next(step), expected[step]) for step in range(3, 6))


# Learning


def test_the_learning_rate_rises_to_its_peak_and_falls_to_nothing() -> None:
    cfg = options(steps=100, warmup=0.1, learning_rate=1.0)
    rates = [learning_rate(cfg, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[10] == max(rates) == 1.0
    assert rates[-1] == pytest.approx(1 / 90)


def test_the_loss_is_that_of_transformers_own_masked_language_model(tokenizer: Any) -> None:
    learner = Learner(options(), tokenizer)
    rows = pretrain_data.pack([(sentence("big", i),) for i in range(8)], tokenizer, 16).astype(np.int64)
    loss, count, _ = learner._loss(learner._collator, rows, "train", 3)
    ids = torch.from_numpy(rows)
    learner._collator.generator = torch_rng(42, "pretrain", "mask", "train", 3)
    shown, labels = learner._collator.torch_mask_tokens(ids.clone(), torch.isin(ids, learner._special))
    expected = learner.model(input_ids=shown, labels=labels).loss
    assert count == (labels != -100).sum() > 5
    assert loss.item() / count == pytest.approx(expected.item(), rel=1e-5)


def test_held_out_tokens_are_measured_hidden_so_that_copying_counts_for_nothing(tokenizer: Any) -> None:
    learner = Learner(options(), tokenizer)
    ids = torch.from_numpy(pretrain_data.pack([(sentence("big", i),) for i in range(8)], tokenizer, 16)).long()
    shown, labels = learner._hiding.torch_mask_tokens(ids.clone(), torch.isin(ids, learner._special))
    assert set(shown[labels != -100].tolist()) == {tokenizer.mask_token_id}
    assert torch.equal(shown[labels == -100], ids[labels == -100])


def test_special_tokens_are_never_to_be_predicted(tokenizer: Any) -> None:
    learner = Learner(options(mask=0.99), tokenizer)
    rows = torch.from_numpy(pretrain_data.pack([(sentence("big", i),) for i in range(8)], tokenizer, 16)).long()
    _, targets = learner._collator.torch_mask_tokens(rows.clone(), torch.isin(rows, learner._special))
    assert not set(targets.unique().tolist()) & {tokenizer.cls_token_id, tokenizer.sep_token_id}


def test_all_positions_are_learned_though_rows_are_shorter_unless_shifting_is_off(tokenizer: Any) -> None:
    rows = pretrain_data.pack([(sentence("big", i),) for i in range(40)], tokenizer, 16).astype(np.int64)
    touched = {}
    for shift in (True, False):
        learner = Learner(options(shift=shift, weight_decay=0.0), tokenizer)
        before = learner.model.bert.embeddings.position_embeddings.weight.detach().clone()
        for step in range(4):
            learner.step(rows, step)
        after = learner.model.bert.embeddings.position_embeddings.weight
        touched[shift] = set((before != after).any(1).nonzero().flatten().tolist())
    assert touched == {True: set(range(32)), False: set(range(16))}


def test_pretraining_lowers_the_held_out_loss_from_that_of_guessing(tmp_path: Path) -> None:
    make(tmp_path / "base", steps=72, batch=8, start="random", learning_rate=0.01)
    record = json.loads((tmp_path / "base/pretrain.json").read_text("utf-8"))
    assert record["final"]["held_out_loss"] < math.log(record["vocabulary"]) - 1
    assert len(record["curve"]) == 12
    assert record["curve"][0]["train_loss"] > record["final"]["train_loss"]


def test_the_global_random_state_is_neither_read_nor_changed(tmp_path: Path, made: Path) -> None:
    torch.manual_seed(123)
    before = torch.get_rng_state()
    make(tmp_path / "base")
    assert torch.equal(before, torch.get_rng_state())
    assert digests(tmp_path / "base") == digests(made)


# Where it starts


def test_tokens_that_stand_near_the_same_tokens_start_with_similar_vectors() -> None:
    """Tokens 3 and 4 are used alike (between 5, 6), 7 and 8 alike (between 9, 10); 0 to 2 are special or unused."""
    draws = np.random.default_rng(0)
    first = [[5, token, 6, 5, 6] for token in draws.choice([3, 4], 200)]
    second = [[9, token, 10, 9, 10] for token in draws.choice([7, 8], 200)]
    rows = {"a": np.array([[0, *row] for row in first + second], dtype=np.int32)}
    vectors = pretrain_data.token_vectors(rows, 11, [0], 4, 1)
    assert vectors.shape == (11, 4)
    assert vectors.dtype == np.float32
    assert not vectors[:3].any()
    assert vectors[3:].std() == pytest.approx(1, abs=0.05)
    unit = vectors[3:] / np.linalg.norm(vectors[3:], axis=1, keepdims=True)
    likeness = unit @ unit.T
    assert likeness[0, 1] > 0.9
    assert likeness[4, 5] > 0.9
    assert likeness[0, 4] < 0.3


def test_the_information_of_two_tokens_is_that_of_the_formula() -> None:
    rows = {"a": np.array([[1, 2], [1, 2], [1, 3]], dtype=np.int32)}
    counts = pretrain_data._counts(rows, 4, [0])
    assert counts.toarray()[1].tolist() == [0, 0, 2, 1]
    assert (counts.toarray() == counts.toarray().T).all()
    context = np.array([0, 3, 2, 1]) ** 0.75
    expected = np.log(2 / (3 * context[2] / context.sum()))
    assert pretrain_data._positive_information(counts).toarray()[1, 2] == pytest.approx(expected)


def test_a_vocabulary_smaller_than_the_vectors_leaves_columns_empty_and_no_neighbours_no_vector() -> None:
    rows = {"a": np.array([[0, 1, 2]] * 3, dtype=np.int32)}
    vectors = pretrain_data.token_vectors(rows, 3, [0], 8, 1)
    assert vectors[1:, :3].any()
    assert not vectors[:, 3:].any()
    assert not pretrain_data.token_vectors({"a": rows["a"][:, :2]}, 3, [0], 8, 1).any()


def test_the_output_starts_at_the_frequencies_of_the_tokens(tokenizer: Any) -> None:
    rows = pretrain_data.pack([(sentence("big", i),) for i in range(40)], tokenizer, 16)
    bias = pretrain_data.log_frequencies([rows], len(tokenizer), special_ids(tokenizer))
    assert np.exp(bias).sum() == pytest.approx(1, rel=1e-5)
    assert bias[tokenizer.cls_token_id] == bias.min()
    assert bias.argmax() == np.bincount(rows[~np.isin(rows, special_ids(tokenizer))]).argmax()


def test_starting_from_counts_replaces_token_vectors_and_bias_and_nothing_else(tokenizer: Any) -> None:
    learner = Learner(options(), tokenizer)
    before = {name: value.clone() for name, value in learner.model.state_dict().items()}
    vectors = np.ones((len(tokenizer), 16), dtype=np.float32)
    vectors[tokenizer.mask_token_id] = 0
    learner.start_from(vectors, np.full(len(tokenizer), -2, dtype=np.float32))
    after = learner.model.state_dict()
    words = "bert.embeddings.word_embeddings.weight"
    tied = {words, "cls.predictions.decoder.weight", "cls.predictions.bias", "cls.predictions.decoder.bias"}
    assert {name for name in after if not torch.equal(after[name], before[name])} == tied & set(after)
    assert torch.equal(after[words][tokenizer.mask_token_id], before[words][tokenizer.mask_token_id])
    assert after[words][7].tolist() == pytest.approx([0.02] * 16)


def test_the_bar_for_a_language_is_what_its_token_frequencies_give() -> None:
    train = np.array([[0, 1, 1, 1, 2]], dtype=np.int32)
    assert guess(train, np.array([[0, 1, 2, 1, 1]], dtype=np.int32), 3, [0]) == {
        "frequency_loss": pytest.approx(-(3 * math.log(3.5 / 5.5) + math.log(1.5 / 5.5)) / 4, abs=1e-5),
        "frequency_accuracy": 0.75,
    }


# Interruption


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_an_interrupted_pretraining_gives_the_same_bytes_as_an_uninterrupted_one(
    tmp_path: Path, made: Path, steps: int
) -> None:
    out = tmp_path / "base"
    with pytest.raises(Interrupted, match=f"stopped at step {steps} of 6"):
        make(out, stop_after(steps), every=4)
    assert not out.exists()
    assert make(out, every=3)
    assert digests(out) == digests(made)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_work_lost_after_the_last_checkpoint_is_done_again(tmp_path: Path, made: Path) -> None:
    def crash() -> bool:
        crash.calls += 1  # type: ignore[attr-defined]
        if crash.calls == 4:  # type: ignore[attr-defined]
            raise RuntimeError("power cut")
        return False

    crash.calls = 0  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError):
        make(tmp_path / "base", crash, every=3)
    assert [p.name for p in (tmp_path / "base.partial").glob("checkpoint-*")] == ["checkpoint-00000003"]
    make(tmp_path / "base")
    assert digests(tmp_path / "base") == digests(made)


def test_a_checkpoint_that_fails_to_be_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {"weight.x": torch.ones(2)}
    save(tmp_path, Position(1, {"a": 3}, 0.5), state)

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(sys.modules[save.__module__], "write_json", full)
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, Position(2, {"a": 4}, 0.5), state)
    found = load(tmp_path)
    assert found is not None
    assert found[0] == Position(1, {"a": 3}, 0.5)


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    save(tmp_path, Position(1), {"weight.x": torch.ones(2)})
    path = tmp_path / "checkpoint-00000001" / TENSORS
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(StorageError, match=f"{TENSORS} is damaged"):
        load(tmp_path)


def test_a_finished_folder_is_left_alone(tmp_path: Path, made: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert make(made) is False
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before


def test_other_options_in_the_same_folder_are_refused_with_what_differs(tmp_path: Path, made: Path) -> None:
    with pytest.raises(StorageError, match=r"'?--steps 6 there, 7 here; --seed 42 there, 1 here"):
        make(made, steps=7, seed=1)
    with pytest.raises(Interrupted):
        make(tmp_path / "base", stop_after(2))
    with pytest.raises(StorageError, match=r"--learning-rate 0\.005 there, 0\.1 here"):
        make(tmp_path / "base", learning_rate=0.1)


def test_a_folder_that_is_not_a_pretraining_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="was not made by pretraining"):
        make(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# The folder


def test_the_record_says_what_it_was_made_from_and_neither_when_nor_where(made: Path) -> None:
    record = json.loads((made / "pretrain.json").read_text("utf-8"))
    assert record["options"]["tasks"] == ["toy"]
    assert (record["options"]["steps"], record["options"]["seed"], record["options"]["precision"]) == (6, 42, "float32")
    assert record["languages"] == {"toy": ["big", "low"]}
    assert (record["corpus"]["texts"], record["corpus"]["dropped_test"]) == (44, 2)
    assert len(record["corpus"]["sha256"]) == 64
    assert sum(record["corpus"]["streams"].values()) == record["corpus"]["train_tokens"]
    assert sum(record["rows_read"].values()) == 6 * 4
    assert record["tokens_read"] == 6 * 4 * 16
    assert set(record["held_out"]) == {"toy/big", "toy/low"}
    assert set(record["versions"]) >= {"python", "fedtailor", "torch", "transformers", "tokenizers"}
    assert str(made.parent) not in (made / "pretrain.json").read_text("utf-8")


def test_the_folder_is_an_ordinary_one_and_loads_as_a_classifier_with_a_fresh_head(made: Path) -> None:
    body = BertForMaskedLM.from_pretrained(made)
    model = load_classifier(made, ["x", "y", "z"], seed=5)
    assert model.classifier.out_features == 3
    assert torch.equal(model.bert.embeddings.word_embeddings.weight, body.bert.embeddings.word_embeddings.weight)
    assert model.bert.pooler.dense.weight.std() > 0
    other = load_classifier(made, ["x", "y", "z"], seed=6)
    assert not torch.equal(other.bert.pooler.dense.weight, model.bert.pooler.dense.weight)
    assert not (made / "checkpoint").exists()
    assert {path.suffix for path in made.iterdir()} == {".json", ".safetensors"}


def test_the_folder_becomes_a_stages_initial_model(made: Path, tmp_path: Path) -> None:
    cfg = ModelConfig(name="mini-mbert", path=str(made))
    hub.check_available(cfg, 32)
    hub.materialise(cfg, ["x", "y"], 1, tmp_path / "initial")
    assert len(load_tokenizer(tmp_path / "initial")) == len(load_tokenizer(made))


# Names and options


def test_the_preset_is_found_by_path_then_by_environment_then_here(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FEDTAILOR_MODELS", raising=False)
    (tmp_path / "models/mini-mbert").mkdir(parents=True)
    assert source.resolve(ModelConfig(name="mini-mbert")).location == "models/mini-mbert"
    elsewhere = tmp_path / "elsewhere/mini-mbert"
    elsewhere.mkdir(parents=True)
    monkeypatch.setenv("FEDTAILOR_MODELS", str(elsewhere.parent))
    assert source.resolve(ModelConfig(name="mini-mbert")).location == str(elsewhere)
    found = source.resolve(ModelConfig(name="mini-mbert", path=str(made)))
    assert (found.kind, found.location) == ("folder", str(made))


def test_a_preset_that_was_not_made_names_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTAILOR_MODELS", str(tmp_path / "my models"))
    command = f"fedtailor pretrain --task masakhanews --task xnli --out '{tmp_path / 'my models/mini-mbert'}'"
    with pytest.raises(ModelError) as caught:
        hub.check_available(ModelConfig(name="mini-mbert"))
    assert command in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("tasks", ["news"], r"'--task': allowed: cldr, masakhanews, xnli.*got \['news'\]"),
        ("steps", 0, "'--steps': .*greater than or equal to 1, got 0"),
        ("learning_rate", -1.0, "'--learning-rate': .*greater than 0, got -1.0"),
        ("mask", 1.0, "'--mask': .*less than 1, got 1.0"),
        ("smoothing", 2.0, "'--smoothing': .*less than or equal to 1, got 2.0"),
        ("heads", 3, r"'--hidden-size' \(16\) must be a multiple of '--heads' \(3\)"),
        ("block", 64, r"'--block' \(64\) must be at most '--max-position' \(32\)"),
        ("precision", "float16", "'--precision' is 'float16', allowed: auto, bfloat16, float32"),
        ("start", "mbert", "'--start': allowed: counts, random, got 'mbert'"),
        ("device", "tpu", "'--device' is 'tpu', allowed here: auto, cpu"),
    ],
)
def test_a_bad_option_is_told_by_name_value_and_what_is_allowed(key: str, value: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        options(**{key: value})


def test_bfloat16_is_chosen_where_the_processor_has_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose_precision("auto", "cpu") == "bfloat16"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False, "avx2": True})
    assert choose_precision("auto", "cpu") == "float32"
    assert choose_precision("bfloat16", "cpu") == "bfloat16"


def test_pretraining_in_bfloat16_keeps_weights_in_float32(tmp_path: Path) -> None:
    make(tmp_path / "base", precision="bfloat16")
    model = BertForMaskedLM.from_pretrained(tmp_path / "base", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_task_without_texts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = {pool: {"en": LanguagePool([], [])} for pool in POOLS}
    entry = TaskEntry(lambda cfg, seed: Source(("a",), empty), "classification")
    monkeypatch.setitem(TASKS, "empty", entry)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="the train parts of empty hold no language"):
        gather(["empty"], 0.1, 1)


# The command


WORDS_OF_TINY = [
    word for key, value in TINY.items() if key != "tasks" for word in (f"--{key.replace('_', '-')}", str(value))
]


def test_the_command_makes_the_preset_and_says_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    monkeypatch.setenv("FEDTAILOR_MODELS", str(tmp_path))
    result = CliRunner().invoke(app, ["pretrain", "--task", "toy", *WORDS_OF_TINY])
    assert result.exit_code == 0, result.output
    assert f"made  model: {tmp_path / 'mini-mbert'}" in result.output
    assert digests(tmp_path / "mini-mbert") == digests(made)
    assert source.resolve(ModelConfig(name="mini-mbert")).location == str(tmp_path / "mini-mbert")
    again = CliRunner().invoke(app, ["pretrain", "--task", "toy", *WORDS_OF_TINY])
    assert (again.exit_code, "there already" in again.output) == (0, True)


def test_ctrl_c_leaves_a_checkpoint_and_exits_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    whole = Learner.step

    def interrupted(self: Learner, rows: Any, step: int) -> float:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return whole(self, rows, step)

    command = ["pretrain", "--task", "toy", "--out", str(tmp_path / "base"), *WORDS_OF_TINY]
    monkeypatch.setattr(Learner, "step", interrupted)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 130
    assert "stopped at step 3 of 6" in result.output
    monkeypatch.setattr(Learner, "step", whole)
    assert CliRunner().invoke(app, command).exit_code == 0
    assert digests(tmp_path / "base") == digests(made)


def test_the_command_refuses_bad_options_before_any_work(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["pretrain", "--task", "toy", "--out", str(tmp_path / "x"), "--steps", "0"])
    assert result.exit_code == 2
    assert "--steps" in result.output
    assert not list(tmp_path.iterdir())


def test_a_log_has_speed_loss_and_time_left_in_its_lines() -> None:
    now = 0.0
    console = Console(width=120, force_terminal=False, file=(log := StringIO()))
    with PretrainView(console, lambda: now) as show:
        show({"kind": "start", "step": 100, "steps": 200, "tokens": 4096})
        for now, step in ((10.0, 110), (40.0, 140), (50.0, 150)):  # noqa: B007 - the clock reads it
            show({"kind": "step", "step": step, "loss": 5.0})
    assert log.getvalue().splitlines() == ["step 140/200  loss 5.000  1.00 steps/s  4,096 tokens/s  ETA 0:01:00"]
