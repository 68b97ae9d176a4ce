"""Finding, checking, naming and copying base models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    Gemma3Config,
    RobertaConfig,
    XLNetConfig,
)

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.models import embedded, hub
from fedtailor.models.dimensions import dimensions
from fedtailor.models.families import positions_of
from fedtailor.models.load import load_tokenizer

LABELS = ["a", "b", "c"]
CFG = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=24, vocab_size=200)
TEXTS = ["one two three", "four five six"] * 5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build_embedded(TEXTS, LABELS, CFG, 32, 1, tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def headless(folder: Path) -> Path:
    """As mBERT is published: body and pooler, the pretraining head instead of a classifier."""
    save_other_head(folder, BertForPreTraining)
    return folder


def save_other_head(folder: Path, kind: type[BertForPreTraining] | type[BertForMaskedLM]) -> None:
    config = BertConfig.from_pretrained(folder)
    config.id2label, config.label2id = {0: "LABEL_0", 1: "LABEL_1"}, {"LABEL_0": 0, "LABEL_1": 1}
    kind(config).save_pretrained(folder)


def at(folder: Path) -> ModelConfig:
    return ModelConfig(name="mbert", path=str(folder))


def test_names_resolve_to_the_embedded_model_a_preset_a_folder_or_a_hub_id(tmp_path: Path) -> None:
    assert hub.resolve(ModelConfig()).kind == "embedded"
    mbert = hub.resolve(ModelConfig(name="mbert", revision="abc"))
    assert (mbert.kind, mbert.location, mbert.revision) == (
        "hub",
        "google-bert/bert-base-multilingual-cased",
        "abc",
    )
    assert hub.resolve(at(tmp_path)) == hub.ModelSource("folder", "mbert", str(tmp_path))
    assert hub.resolve(ModelConfig(name=str(tmp_path))).kind == "folder"
    assert hub.resolve(ModelConfig(name="./nowhere")).kind == "folder"
    assert hub.resolve(ModelConfig(name="owner/name")).kind == "hub"


@pytest.mark.parametrize(
    ("cfg", "blame"),
    [(ModelConfig(name="not a model!"), "model.name"), (ModelConfig(path="/x"), "no meaning for tiny-bert")],
)
def test_a_name_that_can_be_nothing_is_refused(cfg: ModelConfig, blame: str) -> None:
    with pytest.raises(ModelError, match=blame):
        hub.resolve(cfg)


def test_a_complete_folder_and_the_embedded_model_are_available(folder: Path) -> None:
    hub.check_available(at(folder), max_length=32)
    hub.check_available(ModelConfig())


def truncate(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path) -> None:
    names = {"x": "model-00001-of-00002.safetensors", "y": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / names["x"])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def without_padding(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["pad_token"]
    path.write_text(json.dumps(settings))


def other_kind(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))


def fewer_embeddings(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 6}))


def quantised_already(folder: Path) -> None:
    rewrite(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def several_parts(folder: Path) -> None:
    Gemma3Config().save_pretrained(folder)


def rewrite(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def only_gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_1.gguf")


@pytest.mark.parametrize(
    ("damage", "blame"),
    [
        (shutil.rmtree, "does not exist"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (without_weights, r"expected model.safetensors, or .*index.json"),
        (pickled, "pytorch_model.bin is pickle"),
        (truncate, r"model.safetensors \(43 bytes\) is damaged.*Git LFS"),
        (sharded, r"names 2 shards, 1 are missing: model-00002-of-00002.safetensors"),
        (without_tokenizer, "no tokenizer: expected one of tokenizer.json"),
        (without_padding, "no padding token"),
        (other_kind, "no sequence classifier of type 'clip'"),
        (fewer_embeddings, "the model only 6 embeddings"),
        (quantised_already, r"quantised already \(bitsandbytes\); give the original ones, which 'model.weights=4bit'"),
        (several_parts, r"a model of several parts \(gemma3\); give the folder of its language model alone"),
        (only_gguf, "GGUF files are not read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapter_config.json lies beside"),
    ],
    ids=[
        "no folder", "no config", "no weights", "pickle", "pointer", "shards", "no tokenizer", "no pad",
        "kind", "vocab", "quantised", "parts", "gguf", "adapter",
    ],
)  # fmt: skip
def test_what_is_missing_in_a_folder_is_named_before_any_work(
    folder: Path, damage: Callable[[Path], object], blame: str
) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=blame) as caught:
        hub.check_available(at(folder))
    assert str(folder) in str(caught.value)


def test_texts_longer_than_the_model_reads_are_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"task.max_length.*33.*32 tokens"):
        hub.check_available(at(folder), max_length=33)


def test_the_roberta_family_counts_positions_from_the_padding_token_on() -> None:
    assert positions_of(RobertaConfig(max_position_embeddings=66, pad_token_id=1)) == 64
    assert positions_of(BertConfig(max_position_embeddings=66)) == 66
    assert positions_of(XLNetConfig()) is None


def test_what_pads_is_what_the_config_of_the_written_model_says(folder: Path, tmp_path: Path) -> None:
    rewrite(folder, pad_token_id=5)
    out = hub.materialise(at(folder), LABELS, 1, tmp_path / "out")
    pad = load_tokenizer(folder).pad_token_id
    assert pad != 5
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == pad


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty hub cache and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cache(folder: Path, into: Path, repository: str, commit: str) -> None:
    """Lays out a hub cache as huggingface_hub does."""
    home = into / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)


def test_a_hub_model_that_is_not_cached_offline_comes_with_advice(offline: Path) -> None:
    for ask in (hub.check_available, lambda cfg: hub.fingerprint(hub.resolve(cfg))):
        with pytest.raises(ModelError, match=r"not in the local cache and HF_HUB_OFFLINE is set.*model.path=FOLDER"):
            ask(ModelConfig(name="mbert"))
    with pytest.raises(ModelError, match="did you mean 'mbert'"):
        hub.check_available(ModelConfig(name="mbrt"))


def test_a_cached_hub_model_is_found_offline_named_by_its_commit_and_copied(
    offline: Path, folder: Path, tmp_path: Path
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cache(folder, offline, "google-bert/bert-base-multilingual-cased", commit)
    cfg = ModelConfig(name="mbert")
    hub.check_available(cfg)
    assert hub.fingerprint(hub.resolve(cfg)) == f"google-bert/bert-base-multilingual-cased@{commit}"
    hub.materialise(cfg, LABELS, 1, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_fingerprint_of_a_folder_depends_on_weights_config_and_tokenizer_only(folder: Path) -> None:
    source = hub.resolve(at(folder))
    first = hub.fingerprint(source)
    (folder / "README.md").write_text("words")
    assert hub.fingerprint(source) == first
    seen = {first}
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        path = folder / name
        path.write_bytes(path.read_bytes() + b" ")
        seen.add(hub.fingerprint(source))
    assert len(seen) == 4


def test_the_fingerprint_of_the_embedded_model_is_its_sizes() -> None:
    assert hub.fingerprint(hub.resolve(ModelConfig())) == "tiny-bert:64x2x2x128x4000"
    assert hub.fingerprint(hub.resolve(CFG)) != hub.fingerprint(hub.resolve(ModelConfig()))


def test_a_checkpoint_with_a_head_for_the_same_labels_keeps_it(tiny: Path) -> None:
    stored = AutoModelForSequenceClassification.from_pretrained(tiny)
    loaded = hub.load_classifier(tiny, LABELS, seed=99)
    assert all(torch.equal(a, b) for a, b in zip(stored.parameters(), loaded.parameters(), strict=True))
    assert not loaded.training


def test_a_checkpoint_without_a_head_gets_one_that_depends_on_the_seed_alone(headless: Path) -> None:
    torch.manual_seed(0)
    first = hub.load_classifier(headless, LABELS, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = hub.load_classifier(headless, LABELS, seed=5)
    other = hub.load_classifier(headless, LABELS, seed=6)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first.classifier.weight, second.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert first.classifier.weight.shape == (3, 16)
    assert 0.01 < first.classifier.weight.std() < 0.03
    assert not first.classifier.bias.any()
    assert first.config.label2id == {"a": 0, "b": 1, "c": 2}


def test_a_checkpoint_without_a_pooler_gets_a_seeded_one(folder: Path) -> None:
    save_other_head(folder, BertForMaskedLM)
    first, second = (hub.load_classifier(folder, LABELS, seed=5) for _ in range(2))
    other = hub.load_classifier(folder, LABELS, seed=6)
    assert torch.equal(first.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert not torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)


@pytest.mark.parametrize("labels", [["a", "c", "b"], ["a", "b"]], ids=["other order", "other number"])
def test_a_head_for_other_labels_is_refused_unless_it_may_be_replaced(tiny: Path, labels: list[str]) -> None:
    with pytest.raises(ModelError, match=r"made for the labels \['a', 'b', 'c'\]"):
        hub.load_classifier(tiny, labels, seed=5)
    replaced = hub.load_classifier(tiny, labels, seed=5, replace_head=True)
    kept = hub.load_classifier(tiny, LABELS)
    assert replaced.classifier.weight.shape == (len(labels), 16)
    assert not torch.equal(replaced.classifier.weight[0], kept.classifier.weight[0])
    assert torch.equal(replaced.bert.pooler.dense.weight, kept.bert.pooler.dense.weight)


def test_a_body_that_lacks_weights_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 2}))
    with pytest.raises(ModelError, match=r"16 weights of BertForSequenceClassification are missing.*layer\.1"):
        hub.load_classifier(folder, LABELS)


def test_a_classifier_needs_labels(tiny: Path) -> None:
    with pytest.raises(ModelError, match="the task has no labels"):
        hub.load_classifier(tiny, [])


def test_the_attention_implementation_can_be_chosen(tiny: Path) -> None:
    model = hub.load_classifier(tiny, LABELS, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_materialise_writes_a_classifier_in_fp32_and_the_same_bytes_again(headless: Path, tmp_path: Path) -> None:
    half = AutoModelForSequenceClassification.from_pretrained(headless, dtype=torch.bfloat16)
    half.bert.save_pretrained(headless)
    first, second = (hub.materialise(at(headless), LABELS, 3, tmp_path / name) for name in "xy")
    model = hub.load_classifier(first, LABELS, seed=77)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.classifier.weight, hub.load_classifier(second, LABELS).classifier.weight)
    assert hub.load_tokenizer(first)("one two")["input_ids"]
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_the_embedded_model_is_built_not_fetched(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="built from the task's texts"):
        hub.materialise(ModelConfig(), LABELS, 1, tmp_path / "out")


def test_mbert_is_measured_without_its_weights() -> None:
    sizes = dimensions(ModelConfig(name="mbert"), num_labels=7)
    assert sizes.body_parameters == 177_853_440
    assert sizes.parameters == 177_853_440 + 7 * 768 + 7
    assert sizes.embedding_parameters == (119_547 + 512 + 2) * 768
    assert sizes.layers == 74
    assert sizes.linears[4:6] == (
        ("bert.encoder.layer.0.intermediate.dense", 768, 3072),
        ("bert.encoder.layer.0.output.dense", 3072, 768),
    )
    assert sizes.linears[-1] == ("classifier", 768, 7)
    per_rank = 12 * (4 * (768 + 768) + 2 * (768 + 3072)) + (768 + 768) + (768 + 7)
    assert sizes.adapter_parameters(8) == 8 * per_rank


def test_a_folder_is_measured_from_its_own_config_and_matches_the_model(tiny: Path) -> None:
    sizes = dimensions(at(tiny), num_labels=3)
    model = hub.load_classifier(tiny, LABELS)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sizes.layers == 8


def test_tiny_bert_is_measured_from_its_settings_and_targets() -> None:
    cfg = CFG.model_copy(update={"targets": ("query", "classifier")})
    sizes = dimensions(cfg, num_labels=3, max_length=32)
    assert sizes.linears == (("bert.encoder.layer.0.attention.self.query", 16, 16), ("classifier", 16, 3))
    assert sizes.embedding_parameters == (200 + 32 + 2) * 16
