"""The embedded language model: deterministic, ordinary on disk, able to write every script."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.models import embedded, hub
from fedtailor.models.dimensions import dimensions

TEXTS = [
    "Name the capital of Ethiopia", "Addis Ababa", "አዲስ አበባ የኢትዮጵያ ዋና ከተማ ናት", "Yorùbá jẹ́ èdè ní Nàìjíríà",
    "中文 维基百科", "العربية لغة", "Été à Paris", "the capital city", "",
]  # fmt: skip
CFG = ModelConfig(name="tiny-llama", hidden_size=16, heads=2, layers=2, intermediate_size=24, vocab_size=320)
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name the capital"},
    {"role": "assistant", "content": "Paris"},
]


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build_embedded(TEXTS * 3, (), CFG, 32, 42, tmp_path_factory.mktemp("model") / "tiny")


def test_the_folder_is_an_ordinary_hugging_face_folder(built: Path) -> None:
    assert sorted(digests(built)) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    model = AutoModelForCausalLM.from_pretrained(built, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(built, local_files_only=True)
    logits = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits
    assert logits.shape[-1] == len(tokenizer) == 320
    assert logits.dtype == torch.float32
    assert not model.config.tie_word_embeddings
    hub.check_available(ModelConfig(name=str(built)), 32, "generation")


def test_the_bytes_are_the_same_in_another_process_whatever_the_order_of_the_texts(built: Path, tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from fedtailor.core.settings import ModelConfig\n"
        "from fedtailor.models import embedded\n"
        f"cfg = ModelConfig(**{CFG.model_dump(exclude={'targets'})!r})\n"
        f"embedded.build_embedded({list(reversed(TEXTS * 3))!r}, (), cfg, 32, 42, Path(sys.argv[2]))\n"
    )
    root = Path(embedded.__file__).parents[2]
    subprocess.run([sys.executable, "-c", program, str(root), str(tmp_path / "again")], check=True)
    assert digests(tmp_path / "again") == digests(built)


def test_the_seed_changes_the_weights_and_nothing_else(built: Path, tmp_path: Path) -> None:
    other = digests(embedded.build_embedded(TEXTS * 3, (), CFG, 32, 43, tmp_path / "other"))
    changed = {name for name, digest in digests(built).items() if other[name] != digest}
    assert changed == {"model.safetensors"}


def test_the_global_random_state_is_neither_read_nor_changed(built: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    again = embedded.build_embedded(TEXTS * 3, (), CFG, 32, 42, tmp_path / "again")
    assert torch.equal(before, torch.get_rng_state())
    assert digests(again) == digests(built)


def test_special_tokens_have_fixed_ids_and_one_bos_is_put_before_a_text(built: Path) -> None:
    tokenizer = hub.load_tokenizer(built)
    assert tokenizer.convert_ids_to_tokens(range(6)) == list(embedded.LLAMA_SPECIAL)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    ids = tokenizer("Paris")["input_ids"]
    assert ids[0] == 1
    assert ids.count(1) == 1


@pytest.mark.parametrize("text", [*TEXTS, "  two  spaces ", "line\nbreak", "emoji 🦙", "tab\tx"])
def test_any_text_comes_back_from_its_tokens(built: Path, text: str) -> None:
    tokenizer = hub.load_tokenizer(built)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_is_short_and_a_prompt_begins_the_whole_conversation(built: Path) -> None:
    tokenizer = hub.load_tokenizer(built)
    whole = tokenizer.apply_chat_template(TURNS, tokenize=False)
    prompt = tokenizer.apply_chat_template(TURNS[:2], tokenize=False, add_generation_prompt=True)
    assert whole == "<s><|system|>Be brief.<|user|>Name the capital<|assistant|>Paris</s>"
    assert whole == prompt + "Paris</s>"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert [i for i in ids if i < 6] == [1, 3, 4, 5, 2]
    assert (
        ids[: len(tokenizer(prompt, add_special_tokens=False)["input_ids"])]
        == (tokenizer(prompt, add_special_tokens=False)["input_ids"])
    )


def test_its_default_sizes_are_its_own_and_can_be_set() -> None:
    default = ModelConfig(name="tiny-llama")
    assert (default.hidden_size, default.layers, default.heads, default.intermediate_size) == (128, 4, 4, 384)
    assert ModelConfig(name="tiny-llama", layers=1).layers == 1
    assert ModelConfig().hidden_size == 64


def test_its_dimensions_are_those_of_the_built_model(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built, local_files_only=True)
    sizes = dimensions(CFG, max_length=32, kind="generation")
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.body_parameters == sizes.parameters - 320 * 16
    assert sizes.layers == 7 * 2


@pytest.mark.parametrize(
    ("texts", "changed", "complaint"),
    [
        (["", ""], {}, "no characters"),
        (["one"], {"vocab_size": 261}, r"'model.vocab_size' \(261\) is below 262"),
        (["one"], {"hidden_size": 6}, "must be even"),
    ],
)
def test_what_cannot_be_built_is_refused(
    texts: list[str], changed: dict[str, int], complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=complaint):
        embedded.build_embedded(texts, (), CFG.model_copy(update=changed), 32, 42, tmp_path / "none")
    assert not (tmp_path / "none").exists()
