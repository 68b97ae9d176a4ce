from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reading
import torch
from toy import VOCAB, toy_examples, toy_net
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError, ModelError
from fedtailor.core.seeding import numpy_rng
from fedtailor.lanes.batches import Examples, lane_batches, make_batch, training_indices
from fedtailor.lanes.features import client_features
from fedtailor.models.embedded import build_wordpiece
from fedtailor.tasks import task
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.encoding import check_texts, encode_texts
from fedtailor.tasks.source import Example, LanguagePool, Source, TaskEntry
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare
from fedtailor.tasks.tokens import TokenData, tokenise

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
MAX_LENGTH = 20


def sentence(*coordinates: str | int) -> str:
    rng = numpy_rng("pairs", *coordinates)
    return " ".join(rng.choice(WORDS, rng.integers(1, 14)))


def pair_source(second: bool = True) -> Source:
    def examples(pool: str, split: str, count: int) -> list[Example]:
        return [
            Example(sentence(pool, split, i, 1), i % 2, sentence(pool, split, i, 2) if second else None)
            for i in range(count)
        ]

    pools = {p: {"en": LanguagePool(examples(p, "train", 30), examples(p, "test", 8))} for p in ("seen", "unseen")}
    return Source(("no", "yes"), pools)  # type: ignore[arg-type]


@pytest.fixture
def cfg(monkeypatch: pytest.MonkeyPatch) -> TaskConfig:
    monkeypatch.setattr(
        task,
        "TASKS",
        {
            "pairs": TaskEntry(lambda cfg, seed: pair_source(), "classification"),
            "single": TaskEntry(lambda cfg, seed: pair_source(False), "classification"),
        },
    )
    return TaskConfig(name="pairs", languages=("en",), clients_per_language=3)


@pytest.fixture
def data(cfg: TaskConfig, tmp_path: Path) -> TaskData:
    return prepare(cfg, 1, tmp_path / "data")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_wordpiece(WORDS * 20, VOCAB, MAX_LENGTH)


@pytest.fixture
def tokens(data: TaskData, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> TokenData:
    return tokenise(data, tokenizer, MAX_LENGTH, tmp_path / "tokens")


def test_clients_hold_pairs(data: TaskData) -> None:
    stored = {(e.text, e.pair): e.label for e in pair_source().pools["seen"]["en"].train}
    texts, labels = data.texts("seen/en/00", "train")
    pairs = data.pairs("seen/en/00", "train")
    assert pairs is not None
    assert [stored[key] for key in zip(texts, pairs, strict=True)] == labels.tolist()


def test_both_texts_of_a_pair_teach_the_vocabulary(data: TaskData) -> None:
    train = pair_source().pools["seen"]["en"].train
    assert sorted(data.train_texts()) == sorted(text for e in train for text in (e.text, str(e.pair)))


def test_the_data_hash_knows_the_second_text(cfg: TaskConfig) -> None:
    assert reading.fingerprint(cfg, 1) != reading.fingerprint(cfg.model_copy(update={"name": "single"}), 1)


def test_single_texts_have_no_pairs_no_column_for_them_and_no_segments(
    cfg: TaskConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    data = prepare(cfg.model_copy(update={"name": "single"}), 1, tmp_path / "d")
    assert data.pairs("seen/en/00", "train") is None
    assert data.batches[0].schema.names == ["pool", "language", "split", "text", "label"]
    examples = tokenise(data, tokenizer, MAX_LENGTH, tmp_path / "t").examples("seen/en/00", "train")
    assert examples.first_segment_length is None
    assert make_batch([examples], [np.arange(4)], 0).token_type_ids is None


def test_a_task_of_pairs_and_single_texts_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mixed = LanguagePool([Example("a", 0, "b"), Example("c", 1)], [Example("d", 0, "e")])
    source = Source(("no", "yes"), {"seen": {"en": mixed}, "unseen": {"en": mixed}})
    monkeypatch.setattr(task, "TASKS", {"mixed": TaskEntry(lambda cfg, seed: source, "classification")})
    with pytest.raises(DataError, match="some examples are pairs of texts and some are single"):
        prepare(TaskConfig(name="mixed", languages=("en",), clients_per_language=1), 0, tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_pair_is_the_tokenizers_own_encoding_of_the_pair(
    data: TaskData, tokens: TokenData, tokenizer: PreTrainedTokenizerBase, split: str
) -> None:
    cut = 0
    for client in data.clients:
        texts, _ = data.texts(client.id, split)  # type: ignore[arg-type]
        pairs = data.pairs(client.id, split) or []  # type: ignore[arg-type]
        examples = tokens.examples(client.id, split)  # type: ignore[arg-type]
        assert examples.first_segment_length is not None
        for i, (text, pair) in enumerate(zip(texts, pairs, strict=True)):
            own = tokenizer(text, pair, truncation="longest_first", max_length=MAX_LENGTH)
            length = examples.lengths[i]
            assert examples.input_ids[i, :length].tolist() == own["input_ids"]
            assert (np.arange(length) >= examples.first_segment_length[i]).astype(int).tolist() == own["token_type_ids"]
            cut += length == MAX_LENGTH
    assert cut


def test_a_tokenizer_without_segments_gives_pairs_without_segments(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    [ids], first = encode_texts(tokenizer, ["alpha"], ["beta"], MAX_LENGTH)
    assert first is None
    assert ids.tolist() == tokenizer("alpha", "beta")["input_ids"]


def test_names_of_special_tokens_in_a_text_are_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Models that read the last of a text's end tokens (BART, T5) stop where texts have unlike numbers of them."""
    end = str(tokenizer.sep_token)
    (text, pair), _ = encode_texts(tokenizer, [f"alpha {end} beta", "alpha"], None, MAX_LENGTH)
    assert text.tolist().count(tokenizer.sep_token_id) == pair.tolist().count(tokenizer.sep_token_id) == 1
    assert text.tolist() == tokenizer(f"alpha {end[0]} {end[1:]} beta")["input_ids"]
    [both], first = encode_texts(tokenizer, ["alpha"], [f"beta{end}"], MAX_LENGTH)
    assert first is not None
    assert both.tolist().count(tokenizer.sep_token_id) == 2


def test_max_length_must_leave_room_for_a_pair(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ModelError, match=r"'task.max_length' is 3, but the tokenizer adds 3 special tokens to a pair"):
        check_texts(tokenizer, 3, paired=True)


def lanes_of_pairs(tokens: TokenData) -> list[Examples]:
    return [tokens.examples(f"seen/en/{i:02d}", "train") for i in range(3)]


def test_segments_start_where_the_second_text_starts_and_end_with_it(tokens: TokenData) -> None:
    lanes = lanes_of_pairs(tokens)
    batch = make_batch(lanes, [np.arange(4), np.arange(2), np.arange(3)], tokens.pad_id)
    assert batch.token_type_ids is not None
    for lane, examples in enumerate(lanes):
        assert examples.first_segment_length is not None
        for row in range(4):
            types = batch.token_type_ids[lane, row]
            second = examples.lengths[row] - examples.first_segment_length[row] if batch.valid[lane, row] else 0
            assert types.sum() == second
            assert types[: examples.first_segment_length[row]].sum() == 0
            assert (types <= batch.attention_mask[lane, row]).all()


def test_logits_of_pairs_are_transformers_own_lane_by_lane(tokens: TokenData) -> None:
    net, lanes = toy_net(), lanes_of_pairs(tokens)
    indices = [np.arange(7), np.arange(2, 6), np.arange(5)]
    with torch.no_grad():
        got = net.logits(make_batch(lanes, indices, tokens.pad_id))
        for lane, (examples, index) in enumerate(zip(lanes, indices, strict=True)):
            assert examples.first_segment_length is not None
            places = np.arange(examples.input_ids.shape[1])
            real = places < examples.lengths[index, None]
            types = real & (places >= examples.first_segment_length[index, None])
            own = net.model(
                input_ids=torch.from_numpy(examples.input_ids[index]),
                attention_mask=torch.from_numpy(real.astype(np.int64)),
                token_type_ids=torch.from_numpy(types.astype(np.int64)),
            ).logits
            torch.testing.assert_close(got[lane, : len(index)], own, rtol=0, atol=1e-9)
            blind = net.model(
                input_ids=torch.from_numpy(examples.input_ids[index]),
                attention_mask=torch.from_numpy(real.astype(np.int64)),
            ).logits
            assert (own - blind).abs().max() > 1e-3


def test_logits_of_single_texts_are_transformers_own_without_segments() -> None:
    net, examples = toy_net(), toy_examples("single", 6)
    batch = make_batch([examples], [np.arange(6)], 0)
    assert batch.token_type_ids is None
    with torch.no_grad():
        own = net.model(input_ids=batch.input_ids[0], attention_mask=batch.attention_mask[0]).logits
        assert (net.logits(batch)[0] == own).all()


def test_a_model_with_one_segment_type_is_not_given_segments(tokens: TokenData) -> None:
    net = toy_net(type_vocab_size=1)
    batch = make_batch(lanes_of_pairs(tokens), [np.arange(3)] * 3, tokens.pad_id)
    with torch.no_grad():
        own = net.model(
            input_ids=batch.input_ids.flatten(0, 1), attention_mask=batch.attention_mask.flatten(0, 1)
        ).logits
        assert (net.logits(batch).flatten(0, 1) == own).all()


def test_features_of_pairs_know_the_segments_padded_or_not(tokens: TokenData) -> None:
    net, examples = toy_net(torch.float32), tokens.examples("seen/en/00", "train")
    blind = Examples(examples.input_ids, examples.lengths, examples.labels)
    for pad_to in (None, MAX_LENGTH + 4):
        with_segments = client_features(net, examples, tokens.pad_id, pad_to)
        assert (with_segments - client_features(net, blind, tokens.pad_id, pad_to)).abs().max() > 1e-3


def test_every_step_of_training_keeps_each_rows_segments(tokens: TokenData) -> None:
    examples = tokens.examples("seen/en/00", "train")
    assert examples.first_segment_length is not None
    indices = training_indices(len(examples), 1, 4, [numpy_rng("order")])
    for index, batch in zip(indices, lane_batches([examples], [indices], tokens.pad_id), strict=True):
        assert batch.token_type_ids is not None
        assert (
            batch.token_type_ids[0].sum(1).numpy() == examples.lengths[index] - examples.first_segment_length[index]
        ).all()
