"""``fedtailor personalise``: what a run trained meets a client that no run knew."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import run_tiny, tiny
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.personalise import new_client
from fedtailor.tasks import cldr
from fedtailor.tasks.config import TaskConfig

CONFIG, DATA, STORAGE = 2, 3, 5
MAX_LENGTH = 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    run_tiny(tiny(storage, "methods=[fedp2eft]", "fedp2eft.finetune.lr=0.02"))
    return storage


@pytest.fixture(scope="module")
def swahili(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language of no seen client: 160 rows to learn from and 60 to score on."""
    source = cldr.load(TaskConfig(languages=("swa",)), 1)
    folder = tmp_path_factory.mktemp("swahili")
    for name, rows in (
        ("mine", source.pools["seen"]["swa"].train[:160]),
        ("held_out", source.pools["seen"]["swa"].test[:60]),
    ):
        frame = pd.DataFrame([(row.text, source.labels[row.label]) for row in rows], columns=["text", "label"])
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder


def call(*words: object) -> Any:
    return CliRunner().invoke(app, ["personalise", *map(str, words)])


def personalise(runs: Path, data: Path, out: Path, *words: object, budget: int = 2) -> str:
    result = call("--psg", "run", "--storage", runs, "--data", data, "--budget", budget, "--out", out, *words)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def record(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "personalise.json").read_text("utf-8")))


def logits(model: Any, base: str, *texts: Sequence[str]) -> torch.Tensor:
    columns = [list(column) for column in texts]
    tokens = AutoTokenizer.from_pretrained(base)(
        *columns, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
    )
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**tokens).logits
    return found


def scored(found: torch.Tensor, labels: Sequence[str], classes: Sequence[str]) -> tuple[float, float]:
    wanted = torch.tensor([list(classes).index(label) for label in labels])
    loss = torch.nn.functional.cross_entropy(found, wanted)
    return float((found.argmax(-1) == wanted).float().mean()), float(loss)


# ---- what comes out --------------------------------------------------------------------------------------


def test_plain_peft_reproduces_the_reported_scores_and_the_merged_model_the_logits(
    runs: Path, swahili: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    words = ("--test", swahili / "held_out.csv", "--merge", "epochs=6", "batch_size=8", "lr=0.1")
    told = personalise(runs, swahili / "mine.csv", out, *words)
    frame = pd.read_csv(swahili / "held_out.csv", keep_default_na=False)
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base).is_absolute()
    plain = AutoModelForSequenceClassification.from_pretrained(base)
    without = logits(plain, base, frame.text)
    adapted = logits(PeftModel.from_pretrained(plain, str(out)), base, frame.text)
    merged = AutoModelForSequenceClassification.from_pretrained(out / "merged")
    torch.testing.assert_close(logits(merged, str(out / "merged"), frame.text), adapted, atol=1e-4, rtol=0)
    made = record(out)
    for name, found in (("base", without), ("personalised", adapted)):
        accuracy, loss = scored(found, frame.label, made["base"]["labels"])
        assert made["scores"][name]["accuracy"] == pytest.approx(accuracy, abs=1e-5)
        assert made["scores"][name]["loss"] == pytest.approx(loss, abs=1e-5)
        assert made["scores"][name]["count"] == 60
        assert f"{loss:.4f}" in told
    assert made["scores"]["personalised"]["loss"] < made["scores"]["base"]["loss"] - 0.01
    top = pd.read_csv(swahili / "mine.csv").label.value_counts().idxmax()
    assert made["scores"]["majority"] == {
        "class": top, "accuracy": float((frame.label == top).mean()), "correct": int((frame.label == top).sum()),
        "count": 60,
    }  # fmt: skip
    assert sum(made["ranks"].values()) == 2 * made["base"]["layers"] == 16
    assert re.search(r"Ranks kept: 16 = r L = 2 x 8", told)
    assert str(out) in told.replace("\n", "")


def test_the_readme_s_three_lines_load_it(
    runs: Path, swahili: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    personalise(runs, swahili / "mine.csv", tmp_path / "adapter")
    readme = (tmp_path / "adapter" / "README.md").read_text("utf-8")
    code = readme.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) == 3
    monkeypatch.chdir(tmp_path / "adapter")
    names: dict[str, Any] = {}
    exec(code, names)
    assert isinstance(names["model"], PeftModel)
    assert names["model"](**names["tokenizer"](["Uswisi"], return_tensors="pt")).logits.shape == (1, 7)


def test_two_runs_give_the_same_bytes_and_the_language_changes_none_but_its_own_line(
    runs: Path, swahili: Path, tmp_path: Path
) -> None:
    for name, words in (("one", ()), ("two", ()), ("three", ("--language", "swa"))):
        personalise(runs, swahili / "mine.csv", tmp_path / name, "--merge", *words)
    one, two, three = (tree(tmp_path / name) for name in ("one", "two", "three"))
    assert one == two
    assert [name for name in one if one[name] != three[name]] == ["personalise.json"]
    assert record(tmp_path / "three") == record(tmp_path / "one") | {"language": "swa"}


def test_pairs_of_texts_are_scored_as_peft_scores_them(runs: Path, tmp_path: Path) -> None:
    rows = [(f"nchi {i}", f"lugha {i * i}", i % 2) for i in range(40)]
    frame = pd.DataFrame(rows, columns=["premise", "hypothesis", "label"])
    frame.to_json(tmp_path / "mine.jsonl", orient="records", lines=True)
    out = tmp_path / "adapter"
    told = personalise(runs, tmp_path / "mine.jsonl", out, "--test", tmp_path / "mine.jsonl")
    base = json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"]
    adapted = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), str(out))
    found = logits(adapted, base, frame.premise, frame.hypothesis)
    _, loss = scored(found, list(frame.label), range(7))  # type: ignore[arg-type]
    assert record(out)["scores"]["personalised"]["loss"] == pytest.approx(loss, abs=1e-5)
    assert "text 'premise' and 'hypothesis', label 'label'" in told
    assert "40 of 40 held-out texts are trained on too" in told


def test_a_very_long_text_is_cut_and_counted_and_costs_no_time(runs: Path, swahili: Path, tmp_path: Path) -> None:
    frame = pd.concat(
        [
            pd.read_csv(swahili / "mine.csv"),
            pd.DataFrame({"text": ["neno " * 20_000, "x" * 100_000, " "], "label": "unit"}),
        ]
    )
    frame.to_csv(tmp_path / "mine.csv", index=False)
    started = time.process_time()  # others may have the processor meanwhile
    told = personalise(runs, tmp_path / "mine.csv", tmp_path / "out", "--test", swahili / "held_out.csv")
    assert time.process_time() - started < 20
    before = personalise(runs, swahili / "mine.csv", tmp_path / "before", "--test", swahili / "held_out.csv")
    made, usual = record(tmp_path / "out")["data"], record(tmp_path / "before")["data"]
    # A single word of any length is one unknown token to WordPiece.
    assert (made["truncated"], made["empty"]) == (usual["truncated"] + 1, 1)
    assert f"1 without text left out; {made['truncated']} cut to {MAX_LENGTH} tokens" in told
    assert "left out" not in before


def test_more_held_out_than_training_rows_and_unseen_classes_are_noted(
    runs: Path, swahili: Path, tmp_path: Path
) -> None:
    rows = pd.read_csv(swahili / "mine.csv")
    rows[rows.label.isin(["language", "territory"])].head(20).to_csv(tmp_path / "few.csv", index=False)
    told = personalise(runs, tmp_path / "few.csv", tmp_path / "out", "--test", swahili / "mine.csv")
    assert "more held-out rows (160) than training rows (20)" in told
    assert "held out but never trained on: " in told
    told = personalise(runs, swahili / "mine.csv", tmp_path / "half", "--test-fraction", 0.75, "--limit", 40)
    assert re.search(r"more held-out rows \((2\d|30)\) than training rows \(1\d\)", told)


def test_a_copy_of_the_base_model_elsewhere_serves_as_well(runs: Path, swahili: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(next(runs.glob("artifacts/base-*/model")), tmp_path / "base")
    personalise(runs, swahili / "mine.csv", tmp_path / "out", "--base", copied)
    personalise(runs, swahili / "mine.csv", tmp_path / "own")
    one, two = tree(tmp_path / "out"), tree(tmp_path / "own")
    assert {name for name in one if one[name] != two[name]} == {"adapter_config.json", "README.md"}
    assert str(copied) in one["adapter_config.json"].decode()


# ---- what is refused: before any weights are loaded, and without a trace ----------------------------------


Refuse = Callable[..., str]


@pytest.fixture
def refuse(runs: Path, swahili: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    def loaded(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(new_client.OpenStage, "open", loaded)

    def run(code: int, *words: object, **options: object) -> str:
        given = {
            "psg": "run",
            "storage": runs,
            "data": swahili / "mine.csv",
            "budget": 2,
            "out": tmp_path / "out",
        } | options
        before = tree(tmp_path)
        result = call(*(word for name, value in given.items() for word in (f"--{name}", value)), *words)
        assert isinstance(result.exception, SystemExit), result.exception
        assert tree(tmp_path) == before, "something was left behind"
        assert not (tmp_path / "out").exists() or "out" in options
        assert result.exit_code == code, result.output
        return " ".join(result.stderr.split())

    return run


def test_a_budget_that_the_generator_was_not_trained_for(refuse: Refuse) -> None:
    for budget in (0, 3, -1):
        told = refuse(CONFIG, budget=budget)
        assert f"--budget {budget}: fedp2eft of run 'run' serves budgets up to r_max = 2 (allowed: 1 ... 2)" in told


def test_options_that_contradict_or_exceed_are_told_at_once(refuse: Refuse) -> None:
    told = refuse(CONFIG, "--test", "x.csv", "--test-fraction", 1.5, "--limit", 1, "--device", "tpu")
    assert "4 problems" in told
    for part in ("exclude each other", "--test-fraction 1.5: must be between 0 and 1", "--limit 1", "allowed are cpu"):
        assert part in told
    assert "--seed 7: not in run 'run' (it has: 42)" in refuse(CONFIG, "--seed", 7)


def test_an_override_that_fine_tuning_does_not_have(refuse: Refuse) -> None:
    told = refuse(CONFIG, "epoch=3", "fedp2eft.finetune.lr=-1")
    assert "2 problems" in told
    assert "did you mean 'epochs'?" in told


def test_an_out_folder_that_is_not_empty(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    assert "is there already and not an empty folder" in refuse(STORAGE, out=tmp_path / "used")


def test_a_run_that_is_not_there_or_whose_methods_give_no_adapter(refuse: Refuse, tmp_path: Path, runs: Path) -> None:
    assert "no run 'other'" in refuse(STORAGE, psg="other")
    exp = tiny(tmp_path / "lora", "methods=[majority]")
    from tiny import open_run

    open_run(exp, "plain")
    told = refuse(CONFIG, psg="plain", storage=tmp_path / "lora")
    assert "no method of run 'plain' (majority) gives a client an adapter; run it with one of fedprox, " in told
    told = refuse(CONFIG, "--method", "lara")
    assert "--method lara: not in run 'run' (those of run 'run' that give a client an adapter: fedp2eft)" in told


def test_a_strategy_stage_that_is_not_finished(refuse: Refuse, tmp_path: Path, runs: Path) -> None:
    copied = shutil.copytree(runs, tmp_path / "copy")
    next(copied.glob("artifacts/strategy-*/DONE.json")).unlink()
    told = refuse(STORAGE, storage=copied)
    assert "run 'run' has not finished strategy/fedp2eft/seed42: 3 of 3 rounds; fedtailor resume run" in told


def test_a_base_that_is_another_model(refuse: Refuse, tmp_path: Path, runs: Path) -> None:
    own = next(runs.glob("artifacts/base-*/model"))
    retrained = shutil.copytree(own, tmp_path / "retrained")
    weights = load_file(retrained / "model.safetensors")
    save_file(weights | {"classifier.bias": weights["classifier.bias"] + 1}, retrained / "model.safetensors")
    told = refuse(DATA, "--base", retrained)
    assert re.search(
        r"retrained is not the base model of run 'run': its fingerprint is sha256:\w{64}, .* sha256:\w{64}", told
    )
    assert "nowhere" in refuse(DATA, "--base", tmp_path / "nowhere")


def test_a_base_model_that_has_left_the_run(refuse: Refuse, tmp_path: Path, runs: Path) -> None:
    copied = shutil.copytree(runs, tmp_path / "copy")
    shutil.rmtree(next(copied.glob("artifacts/base-*/model")))
    assert "run 'run': its base model is not in" in refuse(STORAGE, storage=copied)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no row"),
        ("corps,sujet\na,unit\n", "Columns there: corps, sujet"),
        (
            "text,label\na,unit\nb,planet\n",
            "'planet' (mine.csv, line 3); allowed: territory (0), language (1), script (2)",
        ),
        ("text,label\na,unit\nb,\n", "1 of 2 rows have no label in column 'label' (mine.csv, line 3)"),
        ("text,label\na,unit\n", "all 1 usable rows are of one class (unit)"),
        ("text,label\na,unit\nb,date\n", "2 usable rows are too few to hold out 0.2 of them"),
        ("text,label\na,unit\nb,unit\n", "all 2 usable rows are of one class (unit); personalising needs at least two"),
        ("text,label\n ,unit\n", "all 1 rows have an empty text"),
    ],
)
def test_data_that_cannot_be_learned_from(refuse: Refuse, tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content)
    assert told in refuse(DATA, data=path)


def test_held_out_rows_are_checked_like_the_others(refuse: Refuse, tmp_path: Path) -> None:
    (tmp_path / "held.csv").write_text("text,label\na,planet\n")
    assert "held.csv: column 'label' has labels" in refuse(DATA, "--test", tmp_path / "held.csv")
    (tmp_path / "pairs.csv").write_text("premise,hypothesis,label\na,b,unit\n")
    assert "pairs.csv has pairs of texts (premise, hypothesis)" in refuse(DATA, "--test", tmp_path / "pairs.csv")


def test_training_that_runs_away_leaves_nothing_behind(runs: Path, swahili: Path, tmp_path: Path) -> None:
    words = (
        "--psg",
        "run",
        "--storage",
        runs,
        "--data",
        swahili / "mine.csv",
        "--budget",
        2,
        "--out",
        tmp_path / "out",
    )
    result = call(*words, "lr=1e30", "epochs=4")
    assert result.exit_code == DATA, result.output
    assert "try a smaller lr than 1e+30" in " ".join(result.stderr.split())
    assert list(tmp_path.iterdir()) == []
