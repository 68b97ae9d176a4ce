from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from fedtailor.core.errors import DataError, ModelError
from fedtailor.tasks import task
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Example, LanguagePool, Source, TaskEntry
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare
from fedtailor.tasks.tokens import TokenData, tokenise
from fedtailor.tasks.unknown_tokens import unknown_tokens

SPLITS = ("train", "test")
MAX_LENGTH = 24


def word_pieces(texts: list[str], **special: str) -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    model.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=500, special_tokens=names, show_progress=False)
    )
    model.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="[UNK]", **special)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    cfg = TaskConfig(languages=("amh", "sna", "yor"), clients_per_language=3)
    return prepare(cfg, 42, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer(data: TaskData) -> PreTrainedTokenizerFast:
    return word_pieces(list(data.train_texts()), pad_token="[PAD]")


@pytest.fixture(scope="module")
def tokens(data: TaskData, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    return tokenise(data, tokenizer, MAX_LENGTH, tmp_path_factory.mktemp("tokens"))


def test_every_example_is_the_tokenizers_own_encoding(
    data: TaskData, tokens: TokenData, tokenizer: PreTrainedTokenizerFast
) -> None:
    for client in data.clients:
        for split in SPLITS:
            texts, labels = data.texts(client.id, split)  # type: ignore[arg-type]
            examples = tokens.examples(client.id, split)  # type: ignore[arg-type]
            assert (examples.labels == labels).all()
            for text, row, length in zip(texts, examples.input_ids, examples.lengths, strict=True):
                assert row[:length].tolist() == tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"]
                assert (row[length:] == tokens.pad_id).all()


def test_rows_are_padded_to_the_clients_own_longest_text(tokens: TokenData) -> None:
    widths = set()
    for client in tokens.clients:
        train, test = (tokens.examples(client.id, split) for split in SPLITS)  # type: ignore[arg-type]
        longest = max(train.lengths.max(), test.lengths.max())
        assert train.input_ids.shape == (client.n_train, longest)
        assert test.input_ids.shape == (client.n_test, longest)
        assert tokens.longest(client.id) == longest <= MAX_LENGTH
        assert tokens.entry(client.id)["train_tokens"] == train.lengths.sum()
        widths.add(int(longest))
    assert len(widths) > 1


def test_arrays_are_int64_and_writable(tokens: TokenData) -> None:
    examples = tokens.examples("seen/amh/00", "train")
    for array in (examples.input_ids, examples.lengths, examples.labels):
        assert array.dtype == np.int64
        array += 1
    assert (tokens.examples("seen/amh/00", "train").labels == examples.labels - 1).all()
    assert len(examples) == tokens.client("seen/amh/00").n_train


def test_clients_and_labels_are_those_of_the_data(data: TaskData, tokens: TokenData) -> None:
    assert tokens.clients == data.clients
    assert tokens.pool("unseen") == data.pool("unseen")
    assert tokens.labels == data.labels
    assert tokens.num_labels == len(data.labels)


def test_equal_input_gives_equal_bytes_and_the_hash_knows_the_tokens(
    data: TaskData, tokens: TokenData, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    again = tokenise(data, tokenizer, MAX_LENGTH, tmp_path / "a")
    cut = tokenise(data, tokenizer, 8, tmp_path / "b")
    assert again.hash == tokens.hash != cut.hash
    assert max(cut.longest(c.id) for c in cut.clients) == 8


def test_max_length_must_leave_room_for_text(
    data: TaskData, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"'task.max_length' is 2, but the tokenizer adds 2"):
        tokenise(data, tokenizer, 2, tmp_path)


def test_long_and_unreadable_texts_give_at_least_one_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = ["x" * 100_000, "x y " * 25_000, "\u200b", " ", "ordinary text"]
    part = LanguagePool([Example(text, i % 2) for i, text in enumerate(odd)], [Example("t", 0)])
    other = LanguagePool([Example("a", 0), Example("b", 1)], [Example("c", 0)])
    source = Source(("a", "b"), {"seen": {"x": part}, "unseen": {"x": other}})
    monkeypatch.setattr(task, "TASKS", {"toy": TaskEntry(lambda cfg, seed: source, "classification")})
    data = prepare(TaskConfig(name="toy", languages=("x",), clients_per_language=1), 0, tmp_path / "data")
    tokenizer = word_pieces(["ordinary text"], pad_token="[PAD]")
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])  # as GPT-2: no special tokens
    examples = tokenise(data, tokenizer, 16, tmp_path / "tokens").examples("seen/x/00", "train")
    texts = data.texts("seen/x/00", "train")[0]
    lengths = dict(zip(texts, examples.lengths.tolist(), strict=True))
    assert lengths[" "] == 1
    assert lengths["x y " * 25_000] == 16
    assert min(lengths.values()) == 1
    blank = examples.input_ids[texts.index(" ")]
    assert blank[0] == tokenizer.unk_token_id


def test_opening_three_hundred_clients_takes_milliseconds(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    cfg = TaskConfig(languages=("amh", "fra"), clients_per_language=80)
    tokenise(prepare(cfg, 0, tmp_path / "data"), tokenizer, 32, tmp_path / "tokens")
    start = time.process_time()
    opened = TokenData.open(tmp_path / "tokens")
    assert time.process_time() - start < 0.05
    assert len(opened.clients) == 320


def test_an_unknown_client_is_an_error(tokens: TokenData) -> None:
    for ask in (tokens.client, tokens.longest, lambda c: tokens.examples(c, "test")):
        with pytest.raises(DataError, match="no client 'nobody'"):
            ask("nobody")


@pytest.mark.parametrize("name", ["manifest.json", "tokens.arrow", "examples.arrow"])
def test_a_damaged_file_is_named(data: TaskData, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str) -> None:
    tokenise(data, tokenizer, MAX_LENGTH, tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=name):
        TokenData.open(tmp_path)


def test_unknown_tokens_are_counted_by_language_each_text_once(data: TaskData, tmp_path: Path) -> None:
    latin = [text for client in data.clients if "/amh/" not in client.id for text in data.texts(client.id, "train")[0]]
    tokenizer = word_pieces(latin, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")
    tokens = tokenise(data, tokenizer, MAX_LENGTH, tmp_path / "tokens")
    expected = dict.fromkeys(("amh", "sna", "yor"), (0, 0))
    for client in data.clients:
        for split in SPLITS:
            for text in data.texts(client.id, split)[0]:  # type: ignore[arg-type]
                ids = tokenizer(text, truncation=True, max_length=MAX_LENGTH)["input_ids"][1:-1]
                unknown, total = expected[client.language]
                expected[client.language] = (unknown + ids.count(tokenizer.unk_token_id), total + len(ids))
    found = unknown_tokens(data, tokens, tokenizer)
    assert found == expected
    assert found["amh"][0] / found["amh"][1] > 0.5 > 10 * found["sna"][0] / found["sna"][1]


def test_a_tokenizer_whose_unknown_token_ends_texts_knows_all(data: TaskData, tmp_path: Path) -> None:
    tokenizer = word_pieces(list(data.train_texts()), pad_token="[PAD]", eos_token="[UNK]")
    found = unknown_tokens(data, tokenise(data, tokenizer, MAX_LENGTH, tmp_path / "tokens"), tokenizer)
    assert [unknown for unknown, _ in found.values()] == [0, 0, 0]
    assert all(total for _, total in found.values())
