"""Causal language models: loaded as they are, given a padding token, refused where scores would come out wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
import transformers
from safetensors.torch import load_file, save_file
from toy import as_talk, toy_examples
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.net import LaneNet
from fedtailor.models import embedded, hub
from fedtailor.models.dimensions import dimensions
from fedtailor.models.families import adapted_linears
from fedtailor.models.folder import write_causal
from fedtailor.models.load import load_causal
from fedtailor.storage.artifacts import Artifacts
from fedtailor.storage.files import Storage

TEXTS = ["one two three", "four five six", "Name the capital", "Paris"] * 5
CFG = ModelConfig(name="tiny-llama", hidden_size=16, heads=2, layers=2, intermediate_size=24, vocab_size=300)
SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
TOKENS = 296
"""All that `TEXTS` are rich enough for."""
PLAIN = {
    "Llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "Qwen2": {"num_key_value_heads": 2},
    "Mistral": {"num_key_value_heads": 2, "sliding_window": 4},
    "GPTNeoX": {},
}
CHANGED = {
    "Gemma2": {"num_key_value_heads": 2, "head_dim": 8},
    "Cohere": {"num_key_value_heads": 2},
    "Granite": {"num_key_value_heads": 2, "logits_scaling": 8.0},
}


def model_of(family: str, **more: Any) -> PreTrainedModel:
    config = getattr(transformers, f"{family}Config")(**SIZES, **more)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return AutoModelForCausalLM.from_config(config).eval()


def at(folder: Path) -> ModelConfig:
    return ModelConfig(name="llama-3.2-3b", path=str(folder))


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def rewrite(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build_embedded(TEXTS, (), CFG, 32, 1, tmp_path_factory.mktemp("causal") / "tiny")


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "model"))


def published(folder: Path, tied: bool = True, shard_size: str = "8KB", spare: int = 0) -> Path:
    """As Llama 3.2 is published: bfloat16 shards, no padding token, embeddings tied."""
    config = embedded.embedded_config(CFG, 32, TOKENS + spare)
    config.tie_word_embeddings, config.pad_token_id = tied, None
    (folder / "model.safetensors").unlink()
    with torch.random.fork_rng():
        torch.manual_seed(4)
        AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size=shard_size)
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    del tokenizer["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


# --- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_loaded_in_the_asked_type_whatever_the_files_hold(folder: Path, dtype: torch.dtype) -> None:
    model = load_causal(published(folder), dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not model.training
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_global_random_state_is_not_changed_by_loading(tiny: Path) -> None:
    before = torch.get_rng_state()
    load_causal(tiny)
    assert torch.equal(before, torch.get_rng_state())


def test_missing_and_misshapen_weights_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.1.mlp.up_proj.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"][:10].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert lost.numel()
    with pytest.raises(ModelError, match=r"2 weights .*lm_head.weight, model.layers.1.mlp.up_proj.weight"):
        load_causal(folder)


def test_pickled_weights_are_never_loaded(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is pickle"):
        hub.check_available(at(folder), 32, "generation")
    with pytest.raises(ModelError, match="cannot load model weights"):
        load_causal(folder)


# --- scores at chosen positions


@pytest.mark.parametrize("family", PLAIN)
def test_scores_at_chosen_positions_are_those_of_the_whole_forward_pass(family: str) -> None:
    model = model_of(family, **PLAIN[family])
    hub.check_kind(model.config, "generation", family)
    lanes = [as_talk(toy_examples(name, 4, 9), name) for name in ("a", "b")]
    batch = make_batch(lanes, [torch.arange(4).numpy()] * 2, pad_id=0)  # type: ignore[arg-type]
    assert batch.positions is not None
    with torch.no_grad():
        found = LaneNet(model, adapted_linears(model)).logits(batch)
        whole = model(input_ids=batch.input_ids.flatten(0, 1), attention_mask=batch.attention_mask.flatten(0, 1)).logits
    whole = whole.view(2, -1, whole.shape[-1])
    expected = whole.gather(1, batch.positions.unsqueeze(-1).expand(-1, -1, whole.shape[-1]))
    torch.testing.assert_close(found[batch.valid], expected[batch.valid], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", CHANGED)
def test_models_that_change_their_scores_after_the_output_embedding_are_refused_by_type(family: str) -> None:
    model = model_of(family, **CHANGED[family])
    complaint = rf"type '{model.config.model_type}' are not supported for generation: they change"
    with pytest.raises(ModelError, match=complaint):
        hub.check_kind(model.config, "generation", "here")


@pytest.mark.parametrize("family", ["Bert", "Roberta", "T5", "Bart"])
def test_encoders_are_no_language_models_although_transformers_lists_some(family: str) -> None:
    config = getattr(transformers, f"{family}Config")()
    with pytest.raises(ModelError, match=r"no causal language model.*allowed: tiny-llama, gpt2-medium, mobile"):
        hub.check_kind(config, "generation", "here")


# --- padding


def test_a_pad_token_that_the_vocabulary_has_is_taken_without_a_new_row(folder: Path, tmp_path: Path) -> None:
    source = published(folder)
    before = digests(source)
    made = hub.materialise(at(source), [], 1, tmp_path / "made", "generation")
    assert digests(source) == before
    tokenizer, model = hub.load_tokenizer(made), load_causal(made)
    old = load_causal(source)
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)  # its text was in the vocabulary
    assert model.config.pad_token_id == 0
    assert torch.equal(model.lm_head.weight, old.lm_head.weight)


def test_a_copy_that_is_not_whole_is_not_published(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(source: Path, out: Path) -> Path:
        (write_causal(source, out) / "config.json").unlink()
        return out

    monkeypatch.setattr(hub, "write_causal", torn)
    artifacts, source = Artifacts(Storage(tmp_path / "runs"), "test"), published(folder)
    with pytest.raises(
        ModelError, match=f"model folder {source}: the copy that stages start from is not whole: .*no con"
    ):
        artifacts.ensure("model-1", lambda out: hub.materialise(at(source), [], 1, out, "generation"))
    assert not [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]


def without_pad_text(folder: Path) -> Path:
    """The token is not in the vocabulary either."""
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "<|reserved|>"
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {("<|reserved|>" if t == "<pad>" else t): i for t, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["8KB", "5GB"])
def test_a_new_padding_token_gets_a_row_at_the_mean_of_the_others(
    folder: Path, tmp_path: Path, tied: bool, shard_size: str
) -> None:
    source = without_pad_text(published(folder, tied, shard_size))
    before = digests(source)
    made, again = (hub.materialise(at(source), [], 1, tmp_path / name, "generation") for name in "xy")
    assert digests(source) == before
    assert digests(made) == digests(again)
    old, new = load_causal(source, torch.bfloat16), load_causal(made, torch.bfloat16)
    assert (hub.load_tokenizer(made).pad_token, new.config.pad_token_id, new.config.vocab_size) == (
        "<pad>",
        TOKENS,
        TOKENS + 1,
    )
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        was, now = old.get_parameter(name), new.get_parameter(name)
        assert now.shape == (TOKENS + 1, 16)
        assert torch.equal(now[:TOKENS], was)
        assert torch.equal(now[TOKENS], was.double().mean(0).bfloat16())
    assert (new.lm_head.weight is new.model.embed_tokens.weight) == tied
    record = json.loads((made / "padding.json").read_text())
    assert record == {"token": "<pad>", "id": TOKENS, "how": "added", "rows_before": TOKENS, "rows": TOKENS + 1}
    hub.check_available(at(made), 32, "generation")


def test_only_shards_with_an_embedding_are_written_anew_the_others_are_the_same_files(
    folder: Path, tmp_path: Path
) -> None:
    source = without_pad_text(published(folder))
    made = hub.materialise(at(source), [], 1, tmp_path / "made", "generation")
    index = json.loads((made / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    rewritten = {shard for shard in set(index.values()) if not (made / shard).samefile(source / shard)}
    assert rewritten == {index["model.embed_tokens.weight"]}


def test_a_model_with_a_row_to_spare_is_not_written_anew(folder: Path, tmp_path: Path) -> None:
    source = without_pad_text(published(folder, spare=4))
    made = hub.materialise(at(source), [], 1, tmp_path / "made", "generation")
    assert hub.load_tokenizer(made).pad_token_id == TOKENS
    assert load_causal(made).config.vocab_size == TOKENS + 4
    assert all((made / shard.name).samefile(shard) for shard in source.glob("*.safetensors"))


def test_the_padding_row_gets_no_gradient_from_the_texts(folder: Path, tmp_path: Path) -> None:
    made = hub.materialise(at(without_pad_text(published(folder, tied=False))), [], 1, tmp_path / "m", "generation")
    model = load_causal(made)
    model.base_model(input_ids=torch.tensor([[1, 5, TOKENS, TOKENS]]))[0].square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert gradient[5].any()
    assert not gradient[TOKENS].any()


def test_an_unknown_token_serves_as_padding_where_there_is_one(folder: Path, tmp_path: Path) -> None:
    source = published(folder)
    rewrite(source / "tokenizer_config.json", unk_token="<|system|>")
    made = hub.materialise(at(source), [], 1, tmp_path / "made", "generation")
    assert (hub.load_tokenizer(made).pad_token, hub.load_tokenizer(made).pad_token_id) == ("<|system|>", 3)
    assert json.loads((made / "padding.json").read_text())["how"] == "unknown"
    assert all((made / shard).samefile(source / shard) for shard in (p.name for p in source.glob("*.safetensors")))


def test_a_sentencepiece_tokenizer_is_read_and_padded_by_its_unknown_token(folder: Path, tmp_path: Path) -> None:
    """As MobileLLaMA is published."""
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS * 20))
    for name in ("tokenizer.json", "chat_template.jinja"):
        (folder / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "texts.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=290, model_type="bpe",
        byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "model_max_length": 64, "add_bos_token": True, **tokens})
    )
    hub.check_available(at(folder), 32, "generation")
    before = AutoTokenizer.from_pretrained(folder)
    tokenizer = hub.load_tokenizer(hub.materialise(at(folder), [], 1, tmp_path / "made", "generation"))
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<unk>", 0)
    for text in (*TEXTS[:4], "unseen: ä 中\n"):
        assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
        assert tokenizer(text)["input_ids"][0] == 1


# --- what is there, and for which task


def test_missing_shards_are_named_before_any_work(folder: Path) -> None:
    source = published(folder)
    gone = sorted(source.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=f"1 are missing: {gone.name}"):
        hub.check_available(at(source), 32, "generation")


def test_a_tokenizer_without_padding_is_no_obstacle_but_one_without_end_is(folder: Path) -> None:
    source = published(folder)
    hub.check_available(at(source), 32, "generation")
    rewrite(source / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match="no end-of-text token"):
        hub.check_available(at(source), 32, "generation")


@pytest.mark.parametrize(
    ("name", "kind", "complaint"),
    [
        ("tiny-bert", "generation", r"tiny-bert\) is for tasks of classification.*use model=tiny-llama"),
        ("tiny-llama", "classification", r"tiny-llama\) is for tasks of generation.*use model=tiny-bert"),
        ("mbert", "generation", "type 'bert' is no causal language model"),
    ],
)
def test_a_model_of_the_wrong_kind_is_refused_by_its_name_alone(name: str, kind: Any, complaint: str) -> None:
    with pytest.raises(ModelError, match=complaint):
        hub.check_available(ModelConfig(name=name), 32, kind)


def test_a_folder_serves_the_tasks_that_its_architecture_can_do(tiny: Path, tmp_path: Path) -> None:
    hub.check_available(at(tiny), 32, "generation")
    hub.check_available(at(tiny), 32, "classification")
    sizes = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=24, vocab_size=200)
    bert = embedded.build_embedded(TEXTS, ["a", "b"], sizes, 32, 1, tmp_path / "bert")
    with pytest.raises(ModelError, match="no causal language model"):
        hub.check_available(at(bert), 32, "generation")


# --- sizes


@pytest.mark.parametrize(
    ("name", "layers", "parameters", "body"),
    [
        ("mobilellama-1.4b", 168, 1_364_297_728, 1_364_297_728 - 32_000 * 2048),
        ("llama-3.2-3b", 196, 3_212_749_824, 3_212_749_824),
    ],
)
def test_the_papers_language_models_are_measured_without_their_files(
    name: str, layers: int, parameters: int, body: int
) -> None:
    sizes = dimensions(ModelConfig(name=name), kind="generation")
    assert (sizes.layers, sizes.parameters, sizes.body_parameters) == (layers, parameters, body)
    assert [linear.rsplit(".", 1)[-1] for linear, _, _ in sizes.linears[:7]] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    ]  # fmt: skip
    assert not any("lm_head" in linear for linear, _, _ in sizes.linears)


def test_attention_of_llama_3_2_has_fewer_keys_than_queries() -> None:
    linears = dimensions(ModelConfig(name="llama-3.2-3b"), kind="generation").linears
    assert [(d_in, d_out) for _, d_in, d_out in linears[:3]] == [(3072, 3072), (3072, 1024), (3072, 1024)]
