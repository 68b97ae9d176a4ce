"""The embedded model: deterministic, ordinary on disk, able to read every script."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.models import embedded

TEXTS = [
    "Addis Ababa is the capital of Ethiopia", "አዲስ አበባ የኢትዮጵያ ዋና ከተማ ናት", "ትግርኛ ኣብ ኤርትራን ኢትዮጵያን",
    "Yorùbá jẹ́ èdè ní Nàìjíríà", "Ẹ káàárọ̀", "中文 维基百科", "العربية لغة", "Été à Paris",
    "the capital city",
]  # fmt: skip
LABELS = ["city", "language"]
CFG = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=24, vocab_size=400)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build_embedded(TEXTS * 3, LABELS, CFG, 32, 42, tmp_path_factory.mktemp("model") / "tiny")


def test_the_folder_is_an_ordinary_hugging_face_folder(built: Path) -> None:
    assert sorted(digests(built)) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForSequenceClassification.from_pretrained(built, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(built, local_files_only=True)
    batch = tokenizer(TEXTS, padding=True, truncation=True, return_tensors="pt")
    logits = model(**batch).logits
    assert logits.shape == (len(TEXTS), 2)
    assert logits.dtype == torch.float32
    assert batch["input_ids"].shape[1] <= 32
    assert model.config.id2label == {0: "city", 1: "language"}
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1


def test_the_bytes_are_the_same_in_another_process_whatever_the_order_of_the_texts(built: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from fedtailor.core.settings import ModelConfig\n"
        "from fedtailor.models import embedded\n"
        f"cfg = ModelConfig(**{CFG.model_dump(exclude={'targets'})!r})\n"
        f"embedded.build_embedded({list(reversed(TEXTS * 3))!r}, {LABELS!r}, cfg, 32, 42, Path(sys.argv[2]))\n"
    )
    root = Path(embedded.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(root), str(tmp_path / "again")], check=True)
    assert digests(tmp_path / "again") == digests(built)


def test_the_seed_changes_the_weights_and_nothing_else(built: Path, tmp_path: Path) -> None:
    other = digests(embedded.build_embedded(TEXTS * 3, LABELS, CFG, 32, 43, tmp_path / "other"))
    changed = {name for name, digest in digests(built).items() if other[name] != digest}
    assert changed == {"model.safetensors"}


def test_the_global_random_state_is_neither_read_nor_changed(built: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = embedded.build_embedded(TEXTS * 3, LABELS, CFG, 32, 42, tmp_path / "again")
    assert torch.equal(before, torch.get_rng_state())
    assert digests(again) == digests(built)


def test_padding_is_zero_and_the_five_special_tokens_come_first(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.convert_ids_to_tokens(range(5)) == list(embedded.BERT_SPECIAL)
    assert tokenizer.pad_token_id == 0
    ids = tokenizer("Paris", "capital")
    assert tokenizer.convert_ids_to_tokens(ids["input_ids"])[0] == "[CLS]"
    assert (ids["token_type_ids"][0], ids["token_type_ids"][-1]) == (0, 1)


def test_case_and_accents_are_kept_and_composed(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.tokenize("Été") != tokenizer.tokenize("été")
    assert tokenizer.tokenize("Été") != tokenizer.tokenize("Ete")
    decomposed = unicodedata.normalize("NFD", "Yorùbá Été")
    assert decomposed != "Yorùbá Été"
    assert tokenizer.tokenize(decomposed) == tokenizer.tokenize("Yorùbá Été")


def test_every_script_of_the_texts_is_read_without_unknown_tokens(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    for text in [*TEXTS, "ኢባስ", "capitalian"]:
        assert "[UNK]" not in tokenizer.tokenize(text), text


def test_frequent_words_become_one_token_and_pieces_spell_the_word(built: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(built)
    assert tokenizer.tokenize("capital") == ["capital"]
    pieces = tokenizer.tokenize("capitalEthiopia")
    assert "".join(piece.removeprefix("##") for piece in pieces) == "capitalEthiopia"
    assert all(piece.startswith("##") for piece in pieces[1:])


def test_the_vocabulary_never_exceeds_its_limit_and_gives_up_rare_characters_first() -> None:
    rare = "".join(chr(0x4E00 + i) for i in range(500))
    tokenizer = embedded.build_wordpiece(["aba aba bab"] * 50 + [rare], 200, 16)
    assert len(tokenizer) <= 200
    assert "[UNK]" not in tokenizer.tokenize("abab")
    assert tokenizer.tokenize(rare[-1]) == ["[UNK]"]


def test_the_model_has_as_many_embeddings_as_the_tokenizer_has_tokens(built: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(built)
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(built)) <= CFG.vocab_size


@pytest.mark.parametrize(("texts", "labels", "blame"), [(["  ", ""], LABELS, "characters"), (TEXTS, [], "labels")])
def test_nothing_to_learn_from_is_an_error(texts: list[str], labels: list[str], blame: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=blame):
        embedded.build_embedded(texts, labels, CFG, 32, 42, tmp_path / "none")
    assert not (tmp_path / "none").exists()
