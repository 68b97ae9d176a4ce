"""Weights from Python packages know what their authors say; a test whose package is missing says what to run."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from fedtailor.models.load import load_causal, load_classifier, load_tokenizer
from fedtailor.models.packaged import INSTALL, packaged_folder
from fedtailor.models.packages import PACKAGED

PARAGRAPH = (
    "The history of the city goes back more than two thousand years. In the Middle Ages it was an important centre of "
    "trade, and many of its old buildings still stand. Today about a hundred thousand people live there, and most of "
    "them work in shops, schools and offices."
)


def folder_of(name: str) -> Path:
    try:
        metadata.distribution(PACKAGED[name].package)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{PACKAGED[name].package} is not installed: {INSTALL}")
    return packaged_folder(name)


def test_smollm2_reads_english_and_answers_a_question() -> None:
    folder = folder_of("smollm2-135m")
    model, tokenizer = load_causal(folder).eval(), load_tokenizer(folder, padded=False)
    ids = torch.tensor([tokenizer(PARAGRAPH).input_ids])
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True, return_dict=True
    )
    prompt = torch.tensor([asked["input_ids"]])
    with torch.no_grad():
        assert float(model(input_ids=ids, labels=ids).loss.exp()) < 15
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True)
    assert answer.strip() == "The capital of France is Paris."


def test_minilm_puts_paraphrases_closer_than_strangers() -> None:
    folder = folder_of("minilm")
    model, tokenizer = load_classifier(folder, ["a", "b"]), load_tokenizer(folder)
    texts = [
        "How do I bake bread at home?",
        "What is the way to make my own bread?",
        "The stock market fell on Monday.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.base_model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    same, other = float(mean[0] @ mean[1]), float(mean[0] @ mean[2])
    assert same > 0.7
    assert other < 0.3
