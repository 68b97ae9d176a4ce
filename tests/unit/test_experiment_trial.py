"""A model that a run could not use is found before the run, and what there is to know of it is said."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, model_of
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.experiment import trial
from fedtailor.experiment.trial import try_model
from fedtailor.models.folder import check_folder
from fedtailor.models.hub import materialise
from fedtailor.models.load import load_tokenizer, quiet

WORDS = ["[PAD]", "[UNK]", "[END]", *"abcdefgh"]
LABELS = ["x", "y", "z"]


def tokenizer(pad: str = "[PAD]") -> PreTrainedTokenizerFast:
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A [END]", special_tokens=[("[END]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=pad, unk_token="[UNK]", eos_token="[END]")


def folder_with(name: str, out: Path, pad: str = "[PAD]", **settings: Any) -> Path:
    architecture = next(a for a in ARCHITECTURES if a.name == name)
    config = architecture.config(40, 2)
    for key, value in settings.items():
        setattr(config, key, value)
    with quiet():
        model_of(config, "classification").save_pretrained(out)
    tokenizer(pad).save_pretrained(out)
    return out


def tried(folder: Path, **more: Any) -> tuple[str, ...]:
    return try_model(ModelConfig(name=str(folder), **more), "classification", folder)


def test_nothing_is_said_of_a_model_that_does_all(tmp_path: Path) -> None:
    assert tried(folder_with("GPT-2", tmp_path / "m")) == ()


def test_a_large_model_is_not_loaded_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with("BERT", tmp_path / "m")
    monkeypatch.setattr(trial, "LARGEST_TRIED", 1000)
    [said] = tried(folder)
    assert said.startswith("the model is large")


def test_an_adapter_that_is_another_in_peft_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = folder_with("BERT", tmp_path / "m")
    right = trial.export_adapter

    def half(layers: Any, a: Any, b: Any, lam: Any, scale: float, *rest: Any) -> Mapping[str, bytes]:
        return right(layers, a, b, lam, scale / 2, *rest)

    monkeypatch.setattr(trial, "export_adapter", half)
    with pytest.raises(
        ModelError, match="BertForSequenceClassification: an exported adapter gives other scores in peft"
    ):
        tried(folder)


def test_attention_that_would_drop_gemma_2s_soft_cap_is_refused(tmp_path: Path) -> None:
    folder = folder_with("Gemma 2", tmp_path / "m", attn_logit_softcapping=0.05)
    assert tried(folder) == tried(folder, attention="eager") == ()
    with pytest.raises(ModelError, match="does not support an attention implementation through"):
        tried(folder, attention="sdpa")
    capped, free = (AutoModelForSequenceClassification.from_pretrained(folder).eval() for _ in range(2))
    for layer in free.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    ids = torch.tensor([[3, 4, 5, 6, 2]])
    with torch.no_grad():
        assert (capped(ids).logits - free(ids).logits).abs().max() > 1e-3


def test_a_decoder_pools_at_a_texts_last_token_whatever_its_config_said_of_padding(tmp_path: Path) -> None:
    """Its config names a word as padding: texts that end in it would be scored at the token before."""
    folder = folder_with("Qwen 2", tmp_path / "m", pad_token_id=WORDS.index("c"))
    base = materialise(ModelConfig(name=str(folder)), LABELS, 1, tmp_path / "base")
    assert try_model(ModelConfig(name=str(base)), "classification", base) == ()
    plain = AutoModelForSequenceClassification.from_pretrained(base).eval()
    assert plain.config.pad_token_id == load_tokenizer(base).pad_token_id == 0
    texts = [[3, 4, 5], [6, 5, 4, 3, 7]]
    with torch.no_grad():
        alone = [plain(torch.tensor([text])).logits[0] for text in texts]
        mask = torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
        beside = plain(torch.tensor([[3, 4, 5, 0, 0], texts[1]]), attention_mask=mask).logits
        by_position = plain.score(plain.model(torch.tensor([texts[0]])).last_hidden_state)[0, -1]
    torch.testing.assert_close(beside, torch.stack(alone), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(alone[0], by_position, rtol=1e-4, atol=1e-5)


def test_a_decoder_whose_texts_end_in_the_padding_token_is_refused(tmp_path: Path) -> None:
    folder = folder_with("Llama", tmp_path / "m", pad="[END]")
    with pytest.raises(ModelError, match=r"ends every text with the token that pads, '\[END\]'.*'pad_token'"):
        check_folder(folder)
    check_folder(folder, kind="generation")
    check_folder(folder_with("BERT", tmp_path / "encoder", pad="[END]"))
