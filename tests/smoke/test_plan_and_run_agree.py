"""What a run refuses, its plan refuses in the same words, and before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.core.settings import ModelConfig
from fedtailor.models.embedded import build_embedded

TEXTS = ["one two three", "four five six", "Name the capital", "Paris"] * 5
SIZES = {"hidden_size": 16, "heads": 2, "layers": 1, "intermediate_size": 24, "vocab_size": 300}
NEWS = ("task=cldr", "task.languages=[eng]", "task.clients_per_language=2", "base=none", "methods=[lora]")
TALK = ("task=instructions", "task.path=d.jsonl", "task.max_length=180", "base=none", "methods=[lora]")
ASK = (*TALK, "model=./llama")
ALPACA = (*ASK, "task.template=alpaca")
STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m['role'] }}]{{ m['content'] }}</s>{% endfor %}"
)
"""As Gemma's: no system role, user and assistant in turn, a user first."""


def rewritten(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    cfg = ModelConfig(name="tiny-bert", **SIZES)  # type: ignore[arg-type]
    build_embedded(TEXTS, ["a", "b"], cfg, 32, 1, folder / "bert")
    cfg = ModelConfig(name="tiny-llama", **SIZES)  # type: ignore[arg-type]
    build_embedded(TEXTS, (), cfg, 256, 1, folder / "llama")
    rewritten(folder / "llama/config.json", max_position_embeddings=200)
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Working directory with the models, ``bert`` and ``llama``."""
    monkeypatch.chdir(shutil.copytree(models, tmp_path / "here"))
    return Path()


def write(*turns: Mapping[str, str]) -> None:
    """Data of one client, whose second of five conversations begins with ``turns``."""
    usual = [{"role": "user", "content": "Name it"}, {"role": "assistant", "content": "This"}]
    talks = [{"client": "ana", "messages": [*(turns if i == 1 else ()), *usual]} for i in range(5)]
    Path("d.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")


def refusal(command: str, *words: str) -> tuple[int, str]:
    fixed = ("engine.backend=serial", "storage=runs", "budgets=[1]", "seeds=[1]")
    result = CliRunner().invoke(app, [command, *fixed, *words])
    assert "Traceback" not in result.output
    assert result.exit_code, result.output
    return result.exit_code, result.stderr


def gguf_alone() -> None:
    Path("llama/model.safetensors").rename("llama/model.gguf")


def quantised() -> None:
    rewritten(Path("llama/config.json"), quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})


def other_shapes() -> None:
    rewritten(Path("llama/config.json"), intermediate_size=32)


def adapter_beside() -> None:
    Path("llama/adapter_config.json").write_text("{}")


def no_text() -> None:
    write()
    lines = Path("d.jsonl").read_text().split("\n")
    Path("d.jsonl").write_text("\n".join([*lines[:2], lines[2].replace("ana", "\\ud800"), *lines[3:]]))


def strict(*turns: Mapping[str, str]) -> Callable[[], None]:
    def prepare() -> None:
        Path("llama/chat_template.jinja").write_text(STRICT)
        write(*turns)

    return prepare


PLACE = "d.jsonl, line 2, client 'seen/all/ana': the chat template of './llama' refuses a conversation of "
REMEDY = "1 of 5 examples are refused; use task.template=alpaca"
SYSTEM, GREETING, QUESTION = (
    {"role": role, "content": "hello"} for role in ("system", "assistant", "user")
)  # fmt: skip
CASES: dict[str, tuple[Callable[[], None], tuple[str, ...], tuple[str, ...]]] = {
    "texts longer than the model reads": (write, (*NEWS, "model=./bert", "task.max_length=33"), ("bert", "32 tokens")),
    "answers longer than the model reads": (write, (*ASK, "task.max_length=201"), ("llama", "200 tokens")),
    "a model of the hub": (write, (*NEWS, "model=mbert", "task.max_length=600"), ("model=mbert", "512 tokens")),
    "a GGUF file alone": (gguf_alone, ASK, ("model folder llama", "GGUF files are not read")),
    "quantised weights": (quantised, ASK, ("model folder llama", "bitsandbytes", "model.weights")),
    "weights of other shapes": (other_shapes, ASK, ("llama: 3 weights of LlamaForCausalLM are missing or",)),
    "an adapter beside the weights": (adapter_beside, ASK, ("model folder llama", "adapter_config.json lies beside")),
    "a classifier asked to answer": (write, (*TALK, "model=tiny-bert"), ("tiny-bert", "model=tiny-llama")),
    "more clients than there are": (
        write, (*ASK, "base=fedavg", "base.cohort=2"), ("base.cohort", "the seen pool has 1"),
    ),
    "a system message": (strict(SYSTEM), ASK, (f"{PLACE}system, user, ", "System role not supported", REMEDY)),
    "an assistant that speaks first": (strict(GREETING), ASK, (f"{PLACE}assistant, user, ", REMEDY)),
    "two users in a row": (strict(QUESTION), ASK, (f"{PLACE}user, user, ", "Roles must alternate", REMEDY)),
    "a template without room": (write, (*ALPACA, "task.max_length=100"), ("max_length", "the template alone takes")),
    "nothing but over-long examples": (
        write, (*ALPACA, "task.max_length=135", "task.overlong=drop"), ("'seen/all/ana'", "cut_prompt"),
    ),
    "a template that does not exist": (write, (*ASK, "task.template=alpacca"), ("did you mean 'alpaca'",)),
    "memory of one process for a run in several": (
        write, (*ASK, "storage=memory://x", "engine.backend=ray"), ("memory://x", "serial"),
    ),
    "a name that is no text": (no_text, ASK, ("d.jsonl, line 3", "task.client_column", "name the client anew")),
}  # fmt: skip


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("case", CASES)
def test_a_plan_refuses_what_its_run_would_refuse(case: str) -> None:
    prepare, words, told = CASES[case]
    write()
    prepare()
    planned, run = refusal("plan", *words), refusal("run", *words)
    assert planned == run
    for part in told:
        assert part in planned[1]
    assert not list(Path().glob("runs/*/run.json"))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", [(), ("task.template=alpaca",)], ids=["chat", "alpaca"])
def test_a_plan_of_what_can_run_shows_the_model_and_its_unknown_tokens(words: tuple[str, ...]) -> None:
    strict(*([SYSTEM] if words else []))()
    usual = ("model=llama-3.2-3b", "model.path=./llama", "engine.backend=serial", "storage=runs", "budgets=[1]")
    result = CliRunner().invoke(app, ["plan", *TALK, *usual, *words])
    assert result.exit_code == 0, result.output
    assert "llama-3.2-3b (from ./llama)" in result.output
    assert "The model knows every token of the texts." in result.output


@pytest.mark.usefixtures("here")
def test_what_only_this_machine_lacks_is_noted() -> None:
    write()
    words = (*TALK, "model=./llama", "storage=runs", "engine.num_gpus=1", "engine.actors=9")
    result = CliRunner().invoke(app, ["plan", *words])
    assert result.exit_code == 0, result.output
    assert "A run on this machine would be refused: engine.num_gpus=1 for 9 actor(s)" in " ".join(result.output.split())
