"""An exported adapter, loaded by peft, computes W x + scale * B diag(lambda) A x in every module."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from toy import write_adapter
from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedModel

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.adapters.peft_export import CONFIG_FILE, WEIGHTS_FILE, export_adapter
from fedtailor.core.errors import ModelError
from fedtailor.core.scope import Scope
from fedtailor.core.settings import ModelConfig
from fedtailor.lanes.layers import AdaptedLayer
from fedtailor.models import embedded, hub
from fedtailor.models.families import adapted_linears
from fedtailor.models.load import save_folder

LABELS = ["a", "b", "c"]
RANK, SCALE = 6, 1.7
TRANSPOSED = [
    f"transformer.h.{i}.{part}" for i in range(2) for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
Parts = tuple[list[str], dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve layers, so that ``layer.1`` also begins ``layer.10`` and ``layer.11``."""
    home = tmp_path_factory.mktemp("export")
    cfg = ModelConfig(hidden_size=16, heads=2, layers=12, intermediate_size=24, vocab_size=200)
    made = embedded.build_embedded(["one two three four"] * 5, LABELS, cfg, 16, 1, home / "made")
    save_folder(hub.load_classifier(made, LABELS), hub.load_tokenizer(made), home / "base")
    return home / "base"


def load(base: Path) -> PreTrainedModel:
    return hub.load_classifier(base, LABELS)


def random_parts(model: nn.Module) -> Parts:
    """Ragged ranks: module i keeps i % (RANK + 1) ranks, not the first ones; some lambdas are negative."""
    draw = torch.Generator().manual_seed(3)
    layers = [AdaptedLayer.of(*pair) for pair in adapted_linears(model)]
    names = [layer.name for layer in layers]
    a = {layer.name: torch.randn(RANK, layer.d_in, generator=draw) * 0.3 for layer in layers}
    b = {layer.name: torch.randn(layer.d_out, RANK, generator=draw) * 0.3 for layer in layers}
    lam = {name: torch.randn(RANK, generator=draw) for name in names}
    for i, name in enumerate(names):
        lam[name][torch.randperm(RANK, generator=draw)[i % (RANK + 1) :]] = 0.0
    return names, a, b, lam


def expected_logits(model: nn.Module, parts: Parts, batch: dict[str, Tensor]) -> Tensor:
    """The definition, by forward hooks: it neither trims, nor folds, nor merges, nor knows peft."""
    names, a, b, lam = parts
    modules = dict(model.named_modules())

    def add(name: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return output + SCALE * ((inputs[0] @ a[name].T) * lam[name]) @ b[name].T

        return hook

    handles = [modules[name].register_forward_hook(add(name)) for name in names]
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    for handle in handles:
        handle.remove()
    return logits


def batch() -> dict[str, Tensor]:
    ids = torch.randint(5, 20, (4, 9), generator=torch.Generator().manual_seed(8))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def exported(parts: Parts, client: str = "seen/amh/00") -> dict[str, bytes]:
    names, a, b, lam = parts
    layers = [AdaptedLayer(name, a[name].shape[1], b[name].shape[0], name in TRANSPOSED) for name in names]
    return export_adapter(layers, a, b, lam, SCALE, "../base", client)


def test_peft_computes_the_adapted_model_also_after_merging(base: Path, tmp_path: Path) -> None:
    parts = random_parts(load(base))
    expected = expected_logits(load(base), parts, batch())
    with torch.no_grad():
        plain = load(base)(**batch()).logits
    write_adapter(exported(parts), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(adapted(**batch()).logits, expected, atol=1e-5, rtol=0)
        assert (expected - plain).abs().max() > 0.01
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch()).logits, expected, atol=1e-5, rtol=0)
        save_folder(merged, hub.load_tokenizer(base), tmp_path / "merged")
        reloaded = load(tmp_path / "merged")
        torch.testing.assert_close(reloaded(**batch()).logits, expected, atol=1e-5, rtol=0)


def test_every_module_gets_its_own_rank_and_the_same_scale(base: Path, tmp_path: Path) -> None:
    parts = random_parts(load(base))
    names, _, _, lam = parts
    write_adapter(exported(parts), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    layers = {n: m for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    kept = {name: int((lam[name] != 0).sum()) for name in names}
    assert {name: layer.r["default"] for name, layer in layers.items()} == {n: r for n, r in kept.items() if r}
    assert {round(layer.scaling["default"], 12) for layer in layers.values()} == {SCALE}
    ranks = [kept[f"bert.encoder.layer.{i}.output.dense"] for i in (1, 11)]
    assert ranks[0] != ranks[1]
    assert 0 in kept.values()


def test_an_adapter_saved_again_by_peft_still_computes_the_same(base: Path, tmp_path: Path) -> None:
    parts = random_parts(load(base))
    write_adapter(exported(parts), tmp_path / "adapter")
    PeftModel.from_pretrained(load(base), tmp_path / "adapter").save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(load(base), tmp_path / "again").eval()
    with torch.no_grad():
        expected = expected_logits(load(base), parts, batch())
        torch.testing.assert_close(again(**batch()).logits, expected, atol=1e-5, rtol=0)


def test_a_single_kept_module_leaves_all_others_alone(base: Path, tmp_path: Path) -> None:
    names, a, b, lam = random_parts(load(base))
    for name in names:
        lam[name] = torch.zeros(RANK)
    lam["bert.encoder.layer.1.output.dense"][2] = 0.5
    write_adapter(exported((names, a, b, lam)), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(load(base), tmp_path / "adapter")
    layers = [n for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)]
    assert layers == ["bert.encoder.layer.1.output.dense"]


class Nested(nn.Module):
    """``classifier`` is also the end of ``head.classifier`` and ``tail.classifier``."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(5, 3)
        self.head = nn.ModuleDict({"classifier": nn.Linear(5, 5)})
        self.tail = nn.ModuleDict({"classifier": nn.Linear(5, 5)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classifier(self.tail["classifier"](self.head["classifier"](x)))
        return y


def test_a_path_that_ends_other_paths_adapts_neither_them_nor_takes_their_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested()
    names, a, b, lam = random_parts(model)
    assert names == ["classifier", "head.classifier", "tail.classifier"]
    for name, rank in zip(names, (2, 0, 3), strict=True):
        lam[name] = torch.where(torch.arange(RANK) < rank, 0.5, 0.0)
    x = torch.randn(4, 5)
    y = x @ model.head["classifier"].weight.T + model.head["classifier"].bias
    for layer, name in ((model.tail["classifier"], "tail.classifier"), (model.classifier, "classifier")):
        y = layer(y) + SCALE * ((y @ a[name].T) * lam[name]) @ b[name].T
    write_adapter(exported((names, a, b, lam)), tmp_path / "adapter")
    adapted = PeftModel.from_pretrained(model, tmp_path / "adapter")
    layers = {n: m.r["default"] for n, m in adapted.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert layers == {"tail.classifier": 3, "classifier": 2}
    torch.testing.assert_close(adapted(x), y, atol=1e-5, rtol=0)


def test_the_config_names_modules_in_full_and_no_task_type(base: Path) -> None:
    parts = random_parts(load(base))
    config = json.loads(exported(parts)[CONFIG_FILE])
    kept = [name for name in parts[0] if bool(parts[3][name].any())]
    assert config["target_modules"] == kept == list(config["rank_pattern"])
    assert config["task_type"] is None
    assert config["modules_to_save"] is None
    assert config["base_model_name_or_path"] == "../base"
    assert "classifier" in kept


def test_bytes_do_not_depend_on_the_order_of_the_mappings_nor_on_the_run(base: Path) -> None:
    names, a, b, lam = random_parts(load(base))
    backwards = [dict(reversed(part.items())) for part in (a, b, lam)]
    assert exported((names, a, b, lam)) == exported((names, *backwards))  # type: ignore[arg-type]


def test_an_adapter_without_any_rank_names_its_client(base: Path) -> None:
    names, a, b, _ = random_parts(load(base))
    nothing = {name: torch.zeros(RANK) for name in names}
    with pytest.raises(ModelError, match=r"client seen/yor/07: no rank is kept in any of its 74 modules"):
        exported((names, a, b, nothing), client="seen/yor/07")


def test_values_that_are_not_finite_and_wrong_shapes_name_client_and_module(base: Path) -> None:
    names, a, b, lam = random_parts(load(base))
    broken = a | {"classifier": torch.full_like(a["classifier"], float("nan"))}
    with pytest.raises(ModelError, match=r"client seen/amh/00, classifier: .*not finite"):
        exported((names, broken, b, lam))
    with pytest.raises(ModelError, match=r"client seen/amh/00, classifier: A \(6, 16\), B \(3, 5\)"):
        exported((names, a, b | {"classifier": b["classifier"][:, :5]}, lam))


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_scale_without_effect_or_meaning_is_refused(scale: float) -> None:
    with pytest.raises(ModelError, match="scale"):
        export_adapter([], {}, {}, {}, scale, "base", "c")


def test_writing_replaces_a_folder_as_a_whole_and_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    folder = tmp_path / "client" / "adapter"
    write_adapter({"old": b"1", WEIGHTS_FILE: b"2"}, folder)
    write_adapter({WEIGHTS_FILE: b"3"}, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {WEIGHTS_FILE: b"3"}
    with pytest.raises(FileNotFoundError):
        write_adapter({WEIGHTS_FILE: b"4", "no/such": b"5"}, folder)
    assert (folder / WEIGHTS_FILE).read_bytes() == b"3"
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def gpt2() -> GPT2ForSequenceClassification:
    config = GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, num_labels=3, pad_token_id=0)
    torch.manual_seed(1)
    model = GPT2ForSequenceClassification(config).eval()
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "transformer.h" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return model


def test_layers_that_keep_their_weight_transposed_are_the_same_in_peft_and_merged(tmp_path: Path) -> None:
    """GPT-2: c_attn is (16, 48), and of the square c_proj no shape would say which way round it is."""
    parts = random_parts(gpt2())
    names, a, b, lam = parts
    assert names == [*TRANSPOSED, "score"]
    expected = expected_logits(gpt2(), parts, batch())
    write_adapter(exported(parts), tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / CONFIG_FILE).read_text())["fan_in_fan_out"]
    with warnings.catch_warnings():
        # Its head keeps it the usual way, which peft sets and says.
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        adapted = PeftModel.from_pretrained(gpt2(), tmp_path / "adapter").eval()
    whole, plain = LoraAdapter(RANK, SCALE, Scope.SHARED), gpt2()
    values = {f"lora_A.{n}": a[n].numpy() for n in names} | {f"lora_B.{n}": (b[n] * lam[n]).numpy() for n in names}
    with torch.no_grad():
        whole.merge(plain, values)
        for logits in (
            adapted(**batch()).logits,
            adapted.merge_and_unload()(**batch()).logits,
            plain(**batch()).logits,
        ):
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
        assert (expected - gpt2()(**batch()).logits).abs().max() > 0.01
