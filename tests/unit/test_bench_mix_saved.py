"""pFedGPT's search on what a finished run committed: the pair is the run's, and ablations cost what the whole costs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import run_tiny, talk

from fedtailor.methods.pfedgpt import PFedGptConfig
from fedtailor.storage.run_folder import RunFolder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TABLE_4 = ("stage 1, low", "stage 1, high", "stage 2, low", "stage 2, high", "always high")


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program; gone from the modules afterwards."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import mix_saved

    yield mix_saved
    del sys.modules["mix_saved"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    storage = tmp_path_factory.mktemp("mix")
    return run_tiny(
        talk(
            storage, "methods=[pfedgpt]", "pfedgpt.validation=own_holdout", "pfedgpt.evaluations=[3,3]",
            "pfedgpt.initial=2", "pfedgpt.rank=2", "pfedgpt.lr=2e-2", "pfedgpt.epochs=4", "pfedgpt.batch_size=8",
        )
    )  # fmt: skip


def test_own_and_common_lora_are_those_of_the_run(bench: Any, run: RunFolder, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert bench.main([run.storage.url, run.run_id, "whole", "stage 1, high", "grid", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["clients"]
    rows = run.metrics("personalise").query("method == 'pfedgpt' and metric == 'loss'").set_index("client")
    clients = list(found["whole"])
    assert 1 < len(clients) < len(set(rows.index)), "those that were never sampled have no LoRA of their own"
    for client in clients:
        noted = (rows.value * rows.weight)[[client]].sum() / rows.weight[[client]].sum()
        assert found["w = 1"][client]["test"] == pytest.approx(noted, abs=1e-5)
        assert abs(found["w = 0"][client]["test"] - noted) > 1e-3
    for name in ("stage 1, high", "grid"):
        assert {row["evaluations"] for row in found[name].values()} == {11.0}
        for row in found[name].values():
            assert row["V: mix"] <= min(row["V: w = 0"], row["V: w = 1"]) + 1e-6


def test_variants_have_the_whole_methods_number_of_evaluations(bench: Any) -> None:
    known = {name: cfg for name, (_, cfg) in bench.variants(PFedGptConfig(stages="one", lr=0.5)).items()}
    whole = known["whole"]
    assert (whole.stages, whole.fidelity, whole.lr) == ("both", "low_to_high", 0.5)
    most = sum(whole.budget) + whole.top + 2
    assert {sum(known[name].budget) for name in TABLE_4} == {len(known["grid"].weights)} == {most}
    assert known["random"].evaluations == sum(whole.budget)
    for name in TABLE_4:
        assert known[name].model_dump(exclude={"stages", "fidelity"}) == whole.model_dump(
            exclude={"stages", "fidelity"}
        )


def test_a_share_of_the_pool_needs_a_pool(bench: Any) -> None:
    assert [cfg.sample_weight for name, (_, cfg) in bench.variants(PFedGptConfig()).items() if "weight" in name] == [
        0.125, 0.25, 0.5, 1.0,
    ]  # fmt: skip
    assert not [name for name in bench.variants(PFedGptConfig(validation="own_holdout")) if "weight" in name]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "no run 'nowhere'"),
        (["run", "stage 3"], "variant 'stage 3'; did you mean"),
        (["run", "weight 1/8"], "variant 'weight 1/8'"),
        (["run", "--seed", "7"], "--seed 7: not in run 'run'"),
        (["run", "--clients", "0"], "--clients 0"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    bench: Any, run: RunFolder, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert bench.main([run.storage.url, *words]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
