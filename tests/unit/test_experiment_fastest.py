"""``auto`` for compute type and attention kernel: measured once, chosen if it is worth it, kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pretend_gpu import pretended_gpu

from fedtailor.core.errors import ConfigError
from fedtailor.experiment import fastest as module
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.fastest import LARGEST_MEASURED, candidates, fastest, settled, unasked
from fedtailor.storage.files import Storage

BOTH = ["engine.dtype=auto", "model.attention=auto"]
Times = Callable[..., list[tuple[str, str | None]]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    """Puts seconds in the place of measurements; the list that it returns fills with what is measured."""

    def put(*seconds: float) -> list[tuple[str, str | None]]:
        measured: list[tuple[str, str | None]] = []

        def step(_exp: Any, _config: Any, choice: tuple[str, str | None], _tokens: int) -> float:
            measured.append(choice)
            return seconds[len(measured) - 1]

        monkeypatch.setattr(module, "_step_seconds", step)
        return measured

    return put


def tiny(*words: str) -> ExperimentBase:
    return compose(["demo"], [*words])


def test_an_experiment_without_auto_is_left_alone(times: Times) -> None:
    measured, exp = times(), tiny("engine.dtype=bfloat16")
    assert settled(exp) == (exp, None)
    assert not measured


def test_the_usual_choice_is_the_first_of_the_candidates() -> None:
    assert candidates(tiny(*BOTH)) == [
        ("float32", None),
        ("float32", "eager"),
        ("bfloat16", None),
        ("bfloat16", "eager"),
    ]
    assert candidates(tiny("engine.dtype=auto", "model.attention=sdpa")) == [("float32", "sdpa"), ("bfloat16", "sdpa")]
    assert candidates(tiny("model.attention=auto")) == [("float32", None), ("float32", "eager")]


def test_the_fastest_is_chosen_where_it_is_worth_it(times: Times) -> None:
    times(1.0, 0.9, 0.7, 0.5)
    exp, chosen = settled(tiny(*BOTH))
    assert (exp.engine.dtype, exp.model.attention) == ("bfloat16", "eager")
    assert chosen is not None
    assert chosen.gain == 2
    assert str(chosen) == "bfloat16 with eager attention: 2.0 times as fast here as the usual choice"


def test_a_small_gain_changes_nothing(times: Times) -> None:
    times(1.0, 0.9, 0.8, 0.78)
    exp, chosen = settled(tiny(*BOTH))
    assert (exp.engine.dtype, exp.model.attention, str(chosen)) == ("float32", None, "float32")


def test_a_plan_says_what_auto_would_gain_where_it_is_worth_it_and_quickly_known(times: Times) -> None:
    measured, exp = times(1.0, 0.9, 0.7, 0.5), compose([], ["model=mbert"])
    for other in (tiny(), compose([], ["model=mbert", "engine.dtype=bfloat16"]), tiny("model.attention=eager")):
        assert unasked(other, 1000) is None
    assert unasked(exp, LARGEST_MEASURED + 1) is None
    assert not measured
    found = unasked(exp, LARGEST_MEASURED)
    assert str(found) == "bfloat16 with eager attention: 2.0 times as fast here as the usual choice"
    assert len(measured) == 4
    times(1.0, 0.9, 0.8, 0.78)
    assert unasked(compose([], ["model=mbert", "task.max_length=32"]), 1000) is None


def test_a_measurement_is_kept_for_this_machine_and_these_shapes(times: Times, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = times(*(1.0, 0.9, 0.7, 0.5) * 4)
    first = fastest(tiny(*BOTH))
    assert fastest(tiny(*BOTH, "seeds=[7]")) == first
    assert len(measured) == 4
    fastest(tiny(*BOTH, "engine.threads=2"))
    assert len(measured) == 8
    monkeypatch.setattr(module, "_processor", lambda: "another machine")
    fastest(tiny(*BOTH))
    assert len(measured) == 12


def test_a_run_that_exists_goes_on_as_it_began(times: Times, tmp_path: Path) -> None:
    measured = times(1.0, 0.9, 0.7, 0.5)
    config = {"engine": {"dtype": "float32"}, "model": {"attention": "eager"}}
    Storage(tmp_path).write_json("begun/run.json", {"config": config})
    exp, chosen = settled(tiny(*BOTH, f"storage={tmp_path}"), "begun")
    assert (exp.engine.dtype, exp.model.attention, chosen) == ("float32", "eager", None)
    half, _ = settled(tiny("engine.dtype=auto", "model.attention=sdpa", f"storage={tmp_path}"), "begun")
    assert (half.engine.dtype, half.model.attention) == ("float32", "sdpa")
    Storage(tmp_path).write_json("old/run.json", {"config": {"engine": {}, "model": {}}})
    old, _ = settled(tiny(*BOTH, f"storage={tmp_path}"), "old")
    assert (old.engine.dtype, old.model.attention) == ("float32", None)
    assert not measured


def test_a_gpu_that_is_not_here_cannot_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"no GPU: name them, e\.g\. engine\.dtype=bfloat16 model\.attention=sdpa"):
        settled(tiny(*BOTH, "engine.num_gpus=1"))


def test_bfloat16_on_a_gpu_without_it_becomes_float32_with_one_notice(times: Times) -> None:
    exp, said = tiny("engine.dtype=bfloat16", "engine.num_gpus=1"), list[str]()
    assert settled(exp, notice=said.append) == (exp, None)  # whatever the GPU of another machine has
    with pretended_gpu():
        assert settled(exp, notice=said.append) == (exp, None)
    assert not said
    with pretended_gpu(bfloat16=False):
        assert settled(exp, notice=said.append)[0] == tiny("engine.dtype=float32", "engine.num_gpus=1")
        assert settled(tiny("engine.dtype=bfloat16"), notice=said.append)[0].engine.dtype == "bfloat16"  # on the CPU
        assert candidates(tiny(*BOTH, "engine.num_gpus=1")) == [("float32", None), ("float32", "eager")]
        half = exp.model_copy(update={"model": exp.model.model_copy(update={"weights": "bfloat16"})})
        with pytest.raises(ConfigError, match=r"'model\.weights': bfloat16 .*\(Pretended\).*allowed: float32"):
            settled(half)
    assert said == ["engine.dtype=bfloat16: the GPU here (Pretended) has no instructions for it, so float32 is used"]


@pytest.mark.parametrize("preset", ["demo", "demo_generation"])
def test_real_steps_are_measured(preset: str) -> None:
    small = ["model.layers=3", "model.hidden_size=16", "model.heads=2", "model.intermediate_size=16"]
    exp, chosen = settled(compose([preset], [*BOTH, *small, "task.max_length=16"]))
    assert (exp.engine.dtype, exp.model.attention) in candidates(tiny(*BOTH))
    assert chosen is not None
    kept = Storage(module.cache_root() / "fastest")
    (file,) = kept.list()
    assert all(second > 0 for second in kept.read_json(file)["seconds"])
