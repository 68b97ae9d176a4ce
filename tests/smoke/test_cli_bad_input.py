"""What the command line refuses: with which exit code, in which words, and leaving nothing behind."""

from __future__ import annotations

import gzip
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.core.config import flatten
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import Experiment, overrides_of, to_json
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

CONFIG, DATA, PLACEMENT, STORAGE = 2, 3, 4, 5
SMALL = ("task.languages=[swa]", "task.clients_per_language=3", "base.cohort=2", "strategy.cohort=2")
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
HEADER = "category\theadline\ttext\turl\n"


@dataclass
class Refusal:
    """How a command ended."""

    code: int
    message: str


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def refuse(storage: Path) -> Callable[..., Refusal]:
    """Runs ``fedtailor run ...``; checks that it ended without traceback and left no trace."""

    def run(*words: str, options: Sequence[str] = ()) -> Refusal:
        before = tree(storage)
        words = ("engine.backend=serial", f"storage={storage}", *words)
        result = CliRunner().invoke(app, ["run", *words, *options])
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit), result.exception
        assert tree(storage) == before, "something was left behind"
        assert result.stdout.strip() in ("", *seeds_announced(result.stdout))
        return Refusal(result.exit_code, result.stderr)

    return run


def seeds_announced(text: str) -> list[str]:
    """Standard output may only say that data is being prepared."""
    return [text.strip()] if all("data/seed" in line for line in text.strip().splitlines()) else []


def tree(folder: Path) -> dict[str, bytes]:
    """Every path below a folder with its content; hidden ones too."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything is built or loaded that belongs to a model."""
    from fedtailor.experiment import prepare
    from fedtailor.models import hub

    def loaded(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was touched")

    for module, name in ((hub, "load_classifier"), (prepare, "build_embedded"), (prepare, "load_tokenizer")):
        monkeypatch.setattr(module, name, loaded)
    monkeypatch.setattr(hub, "check_available", loaded)


# ---- configuration: exit code 2, before anything else is looked at ----------------------------------------


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("word", "told"),
    [
        (
            "strategy.rouds=3",
            ["unknown key 'strategy.rouds'", "did you mean 'rounds'?", "cohort, evaluate_every, rounds"],
        ),
        ("rounds=3", ["unknown key 'rounds'", "did you mean 'base.rounds' or 'strategy.rounds'?"]),
        ("base.rounds=many", ["'base.rounds'", "valid integer", "'many'"]),
        ("base.rounds=-1", ["'base.rounds'", "greater than or equal to 0", "-1"]),
        ("base.cohort=-0.5", ["'base.cohort'", "greater than 0", "-0.5"]),
        ("base.cohort=17", ["'base.cohort'", "17 clients", "the seen pool has 3", "1 ... 3"]),
        ("strategy.cohort=4", ["'strategy.cohort'", "4 clients", "1 ... 3"]),
        ("methods=[lorra]", ["unknown method 'lorra'", "did you mean 'lora'?", "fedp2eft"]),
        ("task=masakhanew", ["unknown task 'masakhanew'", "did you mean 'masakhanews'?", "cldr"]),
        ("budgets=[2,32]", ["'budgets'", "32 is above 'r_max' = 16", "1 ... 16"]),
        ("engine.dtype=float16", ["'engine.dtype'", "float32, bfloat16", "'float16'"]),
        ("seeds=[1,1]", ["'seeds'", "repeats"]),
        ("budgets=[", ["cannot read the override 'budgets=['"]),
    ],
)
def test_a_bad_value_is_refused_with_key_value_and_what_is_allowed(
    refuse: Callable[..., Refusal], word: str, told: list[str]
) -> None:
    refusal = refuse(*SMALL, word)
    assert refusal.code == CONFIG
    assert [part for part in told if part not in refusal.message] == []


@pytest.mark.usefixtures("no_model")
def test_several_problems_are_told_at_once(refuse: Callable[..., Refusal]) -> None:
    refusal = refuse("strategy.rounds=-1", "methods=[lorra]", "modle=x", "engine.threads=none")
    assert refusal.code == CONFIG
    assert "4 problems" in refusal.message
    assert refusal.message.count("•") == 4


@pytest.mark.usefixtures("no_model")
def test_an_unknown_preset_is_refused_with_the_known_ones(refuse: Callable[..., Refusal]) -> None:
    refusal = refuse("dmeo")
    assert refusal.code == CONFIG
    assert "unknown preset 'dmeo'; did you mean 'demo'?" in refusal.message
    assert "masakhanews_fedp2eft" in refusal.message


@pytest.mark.usefixtures("no_model")
def test_a_hundred_mutated_configurations_are_all_refused_before_a_model_is_touched(
    refuse: Callable[..., Refusal],
) -> None:
    silent = []
    for seed in range(100):
        word, key = mutated(random.Random(seed))
        refusal = refuse("demo", word)
        if refusal.code != CONFIG or key not in refusal.message:
            silent.append((seed, word, refusal))
    assert silent == []


def mutated(rng: random.Random) -> tuple[str, str]:
    """A broken override, and what the message must name."""
    leaves = flatten(Experiment())
    numbers = [k for k, v in leaves.items() if isinstance(v, (int, float)) and not isinstance(v, bool)]
    kind = rng.choice(["typo", "word", "list", "truth", "negative", "cohort", "method", "task", "nan"])
    # A bias may have either sign.
    number = rng.choice([k for k in numbers if kind != "negative" or not k.endswith(".bias")])
    if kind == "typo":
        key = rng.choice(list(leaves))
        at = rng.randrange(len(key))
        key = key[:at] + "q" + key[at:]
        stop = key.find(".", at)
        return f"{key}=1", key if stop < 0 else key[:stop]
    if kind in ("cohort", "method", "task"):
        own = {"cohort": f"strategy.cohort={rng.randint(161, 9999)}"}
        own |= {"method": f"methods=[lora,m{rng.randint(0, 99)}]", "task": f"task=t{rng.randint(0, 99)}"}
        return own[kind], {"cohort": "strategy.cohort", "method": "methods", "task": "task.name"}[kind]
    value = {
        "word": "twelve",
        "list": "[1,2]",
        "truth": "true",
        "negative": f"-{rng.randint(1, 99)}",
        "nan": ".nan",
    }
    return f"{number}={value[kind]}", number


# ---- run id: exit code 5 ----------------------------------------------------------------------------------


def test_the_run_id_of_another_configuration_is_refused_and_that_run_stays_as_it_is(
    refuse: Callable[..., Refusal], storage: Path
) -> None:
    other = compose([], [*SMALL, "engine.backend=serial", f"storage={storage}", "strategy.rounds=7"])
    RunFolder.create(Storage(storage), "mine", to_json(other), overrides_of(other))
    refusal = refuse(*SMALL, "strategy.rounds=8", options=["--run-id", "mine"])
    assert refusal.code == STORAGE
    assert "run id 'mine' belongs to another configuration" in refusal.message
    assert "strategy.rounds is 7 there and 8 here" in refusal.message


@pytest.mark.parametrize("command", ["resume", "status", "digest", "report", "sync"])
def test_a_run_that_does_not_exist_is_refused_with_those_that_do(storage: Path, command: str) -> None:
    exp = compose([], [*SMALL, f"storage={storage}"])
    RunFolder.create(Storage(storage), "mine", to_json(exp))
    result = CliRunner().invoke(app, [command, "yours", "--storage", str(storage)])
    assert result.exit_code == STORAGE
    assert "no run 'yours'" in result.stderr
    assert "mine" in result.stderr


# ---- machine: exit code 4 ---------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["engine.num_gpus=0.25", "engine.num_gpus=2", "engine.memory_gb=8"])
def test_gpus_that_are_not_there_are_refused_with_the_numbers(
    refuse: Callable[..., Refusal], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    refusal = refuse(*SMALL, word, "engine.actors=3")
    assert refusal.code == PLACEMENT
    assert f"{word} for 3 actor(s) cannot be placed" in refusal.message
    assert "(none) hold 0" in refusal.message


# ---- model: exit code 3 -----------------------------------------------------------------------------------


def test_a_model_folder_without_weights_is_refused_before_data_is_prepared(
    refuse: Callable[..., Refusal], tmp_path: Path
) -> None:
    folder = tmp_path / "mbert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    refusal = refuse(*SMALL, "model=mbert", f"model.path={folder}")
    assert refusal.code == DATA
    assert str(folder) in refusal.message
    assert "safetensors" in refusal.message


def test_a_hub_model_that_cannot_be_reached_is_refused_with_the_ways_out(
    refuse: Callable[..., Refusal], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refusal = refuse(*SMALL, "model=nobody/nothing-here")
    assert refusal.code == DATA
    assert "nobody/nothing-here" in refusal.message
    assert "model.path=FOLDER" in refusal.message


# ---- data: exit code 3, before a model is loaded ----------------------------------------------------------


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if the embedded model is built."""

    def built(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was built")

    monkeypatch.setattr("fedtailor.models.embedded.build_embedded", built)


def write_task(folder: Path, rows: int = 60, labels: tuple[str, ...] = ("sports", "health")) -> Path:
    """A masakhanews folder with one language."""
    language = folder / "swa"
    language.mkdir(parents=True)
    for split in ("train", "dev", "test"):
        lines = [f"{labels[i % len(labels)]}\t{split} {i}\tmaandishi {i}\thttp://x/{i}\n" for i in range(rows)]
        (language / f"{split}.tsv").write_text(HEADER + "".join(lines), "utf-8")
    return folder


def refusal_of_data(refuse: Callable[..., Refusal], folder: Path, *words: str) -> Refusal:
    refusal = refuse(*SMALL, "task=masakhanews", f"task.path={folder}", *words)
    assert refusal.code == DATA
    return refusal


pytestmark_data = pytest.mark.usefixtures("no_build")


@pytestmark_data
def test_a_missing_data_folder_is_named(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    assert f"task.path: {tmp_path / 'none'} is not a folder" in refusal_of_data(refuse, tmp_path / "none").message


@pytestmark_data
def test_a_missing_data_folder_of_the_environment_is_named(
    refuse: Callable[..., Refusal], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDTAILOR_DATA", str(tmp_path / "gone"))
    refusal = refuse(*SMALL, "task=masakhanews")
    assert refusal.code == DATA
    assert f"FEDTAILOR_DATA: {tmp_path / 'gone' / 'masakhanews'} is not a folder" in refusal.message


@pytestmark_data
def test_a_missing_data_file_is_named(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "data")
    (folder / "swa" / "dev.tsv").unlink()
    message = refusal_of_data(refuse, folder).message
    assert f"{folder / 'swa'}: missing file, one of dev.tsv" in message


@pytestmark_data
def test_a_truncated_row_is_named_with_file_and_line(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    file = write_task(tmp_path / "data") / "swa" / "train.tsv"
    file.write_text(HEADER + "sports\ta\tb\tc\n" + "sports\tonly")
    assert f"{file}, line 3: 2 columns, expected 4" in refusal_of_data(refuse, tmp_path / "data").message


@pytestmark_data
def test_a_truncated_gzip_file_is_named_with_its_line(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    file = write_task(tmp_path / "data") / "swa" / "train.tsv"
    packed = gzip.compress(file.read_bytes())
    file.unlink()
    file.with_suffix(".tsv.gz").write_bytes(packed[: len(packed) // 2])
    message = refusal_of_data(refuse, tmp_path / "data").message
    assert f"{file}.gz, line " in message
    assert "truncated gzip" in message


@pytestmark_data
def test_bytes_that_are_not_utf8_are_named_with_file_and_line(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    file = write_task(tmp_path / "data") / "swa" / "test.tsv"
    file.write_bytes(HEADER.encode() + b"sports\ta\tb\tc\nsports\t\xff\xfe\tb\tc\n")
    assert f"{file}, line 3: not UTF-8" in refusal_of_data(refuse, tmp_path / "data").message


@pytestmark_data
def test_more_clients_than_texts_is_an_empty_client(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "data", rows=20)
    message = refusal_of_data(refuse, folder, "task.clients_per_language=30").message
    assert "client seen/swa/" in message
    assert "would be empty" in message
    assert "at most" in message
    assert "task.clients_per_language" in message


@pytestmark_data
@pytest.mark.parametrize(("rows", "clients", "told"), [(6, 4, "1 train text and needs 2"), (2, 3, "would be empty")])
def test_a_client_with_too_few_texts_is_named(
    refuse: Callable[..., Refusal], tmp_path: Path, rows: int, clients: int, told: str
) -> None:
    folder = write_task(tmp_path / "data", rows=rows)
    message = refusal_of_data(refuse, folder, f"task.clients_per_language={clients}").message
    assert told in message


@pytestmark_data
def test_a_task_with_one_class_is_refused(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    folder = write_task(tmp_path / "data", labels=("sports",))
    message = refusal_of_data(refuse, folder).message
    assert "one class in the whole task (sports); at least two are needed" in message


@pytestmark_data
def test_an_unknown_language_is_refused_with_the_known_ones(refuse: Callable[..., Refusal], tmp_path: Path) -> None:
    message = refusal_of_data(refuse, write_task(tmp_path / "data"), "task.languages=[xyz]").message
    assert "xyz" in message
    assert "swa" in message


# ---- the command line itself ------------------------------------------------------------------------------


def test_export_wants_a_client_or_the_base(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["export", "mine", "--out", str(tmp_path / "x")])
    assert result.exit_code == CONFIG
    assert "exactly one of --client ID and --base" in result.stderr


def test_export_without_saved_adapters_says_how_to_get_them(storage: Path, tmp_path: Path) -> None:
    exp = compose([], [*SMALL, f"storage={storage}"])
    RunFolder.create(Storage(storage), "mine", to_json(exp))
    words = [
        "--client",
        "seen/swa/00",
        "--budget",
        "8",
        "--out",
        str(tmp_path / "x"),
        "--storage",
        str(storage),
    ]
    result = CliRunner().invoke(app, ["export", "mine", *words])
    assert result.exit_code == STORAGE
    assert "save_adapters was off" in result.stderr
    assert "save_adapters=true" in result.stderr
    assert not (tmp_path / "x").exists()


def test_the_version_is_told() -> None:
    from fedtailor import __version__

    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout.strip()) == (0, f"fedtailor {__version__}")


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, fedtailor.cli; heavy = 'torch', 'ray', 'transformers', 'pandas', 'wandb', 'actors'; "
        "print([name for name in heavy if name in sys.modules])"
    )
    words = [sys.executable, "-c", code]
    found = subprocess.run(words, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert found.stdout.strip() == "[]"


def test_the_module_is_the_command_and_shows_plain_messages() -> None:
    words = [sys.executable, "-m", "fedtailor", "run", "demo", "rounds=3"]
    ended = subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert (ended.returncode, ended.stdout) == (CONFIG, "")
    assert ended.stderr.startswith("The configuration cannot run: 1 problem\n  • unknown key 'rounds'")


def test_any_other_error_keeps_its_traceback_and_ends_with_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("fedtailor.experiment.compose.compose", broken)
    result = CliRunner().invoke(app, ["run", "demo"])
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)
