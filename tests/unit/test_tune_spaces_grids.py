"""Every value of every published grid fits the configuration: a renamed field fails here, not overnight."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import tune_spaces
from fedtailor.core.config import flatten
from fedtailor.core.errors import ConfigError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import Experiment
from fedtailor.methods import METHODS
from tune_spaces import PAPERS, fedp2eft, pf2lora

ROOT = Path(__file__).parents[2]
GRIDS = [(grid.method, grid.space) for grid in tune_spaces.grids().values()]
TRIALS = [(key, value) for _, grid in GRIDS for key, values in grid.items() for value in values]


@pytest.mark.parametrize(("key", "value"), TRIALS, ids=str)
def test_every_value_of_a_grid_arrives_at_its_key_and_nowhere_else(key: str, value: float) -> None:
    before, after = flatten(Experiment()), flatten(compose([], [f"{key}={value}"]))
    assert after == before | {key: value}


def test_a_key_that_does_not_exist_would_be_noticed() -> None:
    with pytest.raises(ConfigError, match="did you mean 'lambda_lr'"):
        compose([], ["fedp2eft.stage1.lamda_lr=0.01"])


def test_a_grid_belongs_to_a_method_that_exists_and_stays_in_its_section() -> None:
    for method, grid in GRIDS:
        assert method in METHODS
        assert {key.split(".")[0] for key in grid} == {method}


def test_no_value_is_listed_twice() -> None:
    for _, grid in GRIDS:
        for key, values in grid.items():
            assert len(set(values)) == len(values), key


def test_what_a_paper_picked_is_in_its_grid_and_is_the_default() -> None:
    defaults = flatten(Experiment())
    for paper in PAPERS:
        tried = {key: values for grid in paper.GRIDS.values() for key, values in grid.space.items()}
        assert paper.PICKED.keys() <= tried.keys()
        for key, value in paper.PICKED.items():
            assert value in tried[key]
            assert defaults[key] == value


def test_what_pf2lora_picked_is_in_its_grids_but_for_one_rate() -> None:
    suffix = {"squad_v1": "_squad", "squad_v2": "_squad", "webnlg": "_nlg", "webnlg_xl": "_nlg", "e2e": "_nlg"}
    outside = []
    for name, table in pf2lora.TABLES.items():
        for key, value in table.items():
            tried = pf2lora.GRIDS[key.split(".")[0] + suffix.get(name, "")].space[key]
            outside += [] if value in tried else [(name, key, value)]
    assert outside == [("cola", "perfedavg_lora.inner_lr", 1e-2)]
    assert all(flatten(Experiment())[key] == value for key, value in pf2lora.TABLES["mnli"].items())


def test_adaloras_grid_has_the_papers_24_trials() -> None:
    grid = fedp2eft.GRIDS["adalora"].space
    assert {key.partition(".")[2]: values for key, values in grid.items()} == {
        "lr": (1e-5, 1e-4, 1e-3, 1e-2),
        "delta_t": (1, 10, 100),
        "orth": (0.1, 0.5),
    }
    assert len(list(itertools.product(*grid.values()))) == 24


def test_no_file_with_grids_is_forgotten() -> None:
    files = sorted(Path(tune_spaces.__file__).parent.glob("*.py"))
    with_grids = {file.stem for file in files if "\nGRIDS" in file.read_text("utf-8")}
    assert with_grids == {paper.__name__.rpartition(".")[2] for paper in PAPERS}


def test_reading_a_grid_starts_no_ray() -> None:
    script = "import sys, tune_spaces; print('ray' in sys.modules)"
    words = [sys.executable, "-c", script]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
