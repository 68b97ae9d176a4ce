"""``fedtailor compare`` on runs that were really trained: the same clients at two learning rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import run_tiny, tiny
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage

CONFIG, STORAGE = 2, 5
WORDS = ("task.languages=[amh,yor]", "task.clients_per_language=2", "methods=[base,lora]", "base.cohort=2",
         "strategy.cohort=2", "base.rounds=1", "budgets=[2]", "personalise.pools=[unseen]")  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    storage = tmp_path_factory.mktemp("runs")
    run_tiny(tiny(storage, *WORDS, "lora.lr=1e-4"), "slow")
    run_tiny(tiny(storage, *WORDS, "lora.lr=0.05"), "fast")
    run_tiny(tiny(storage, *WORDS, "lora.lr=0.05", "scale=0.5"), "half")
    return storage


def compare(*words: object) -> Any:
    return CliRunner().invoke(app, ["compare", *map(str, words)], env={"COLUMNS": "100"})


def test_two_learning_rates_are_compared_over_the_clients_that_both_trained(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = compare("slow", "fast", "--storage", runs, "--out", out)
    assert result.exit_code == 0, result.output
    for part in ("lora.lr", "0.0001", "0.05", digest(Storage(runs), "fast")[:12], "same stages", "Unseen clients"):
        assert part in result.stdout
    assert "base.rounds" not in result.stdout
    results, pairs = (pd.read_csv(out / name).to_dict("records") for name in ("compare.csv", "compare_pairs.csv"))
    assert {row["n_clients"] for row in results} == {4}
    found = {row["method"]: row for row in pairs}
    assert (found["base"]["verdict"], found["base"]["mean_difference"]) == ("same", 0.0)
    assert found["lora"]["verdict"] != "same"
    assert found["lora"]["n_clients"] == 4


def test_runs_of_another_size_have_other_clients_and_no_paired_test(runs: Path) -> None:
    result = compare("slow", "half", "--storage", runs)
    assert result.exit_code == 0, result.output
    assert "slow and half have different clients" in " ".join(result.stdout.split())
    assert next(runs.glob("compare-*/compare.md")).is_file()


@pytest.mark.parametrize(("words", "code", "message"), [
    (["slow"], CONFIG, "needs two different runs or more"),
    (["slow", "fasst"], STORAGE, "did you mean 'fast'?"),
])  # fmt: skip
def test_bad_input_ends_with_a_message_and_no_files(runs: Path, words: list[str], code: int, message: str) -> None:
    before = sorted(runs.iterdir())
    result = compare(*words, "--storage", runs)
    assert (result.exit_code, message in " ".join(result.stderr.split())) == (code, True)
    assert "Traceback" not in result.output
    assert sorted(runs.iterdir()) == before
