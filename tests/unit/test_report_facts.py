"""What a caption says about a run's base, size, model, data and cost."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest

from fedtailor.core.config import validate
from fedtailor.core.messages import METRIC_COLUMNS, ClientCost, metric_row
from fedtailor.experiment.config import Experiment, ExperimentBase
from fedtailor.report import summary
from fedtailor.report.facts import (
    base_line,
    duplicates_sentence,
    fallback_sentences,
    pretrain_sentence,
    scale_sentence,
    strategy_line,
)
from fedtailor.report.scores import checked
from fedtailor.storage.round_store import TIMING_SCHEMA, frame_of, timings_table


def frame(*rows: dict[str, Any]) -> pd.DataFrame:
    return checked(pd.DataFrame(list(rows), columns=list(METRIC_COLUMNS)))


def rounds_of(stage: str, method: str, n: int, **more: Any) -> list[dict[str, Any]]:
    return [metric_row(stage=stage, method=method, round=k, metric="train_loss", **more) for k in range(n)]


def configured(scale: float = 0.1, **base: Any) -> ExperimentBase:
    task = {"name": "xnli", "clients_per_language": 20}
    return validate(Experiment, {"scale": scale, "task": task, "base": base, "strategy": {"rounds": 150}})


@pytest.mark.parametrize(("name", "words"), [
    ("fedavg", "FedAvg, 10 rounds"), ("feddpa", "FedDPA, 10 rounds"),
    ("dept", "DEPT (SPEC), 10 rounds"), ("none", "off the shelf"),
])  # fmt: skip
def test_a_base_is_called_by_its_papers_name(name: str, words: str) -> None:
    assert base_line(configured(name=name), frame()) == words


def test_a_shared_base_is_said() -> None:
    line = base_line(configured(seed=42), frame())
    assert line == "FedAvg, 10 rounds, one base of seed 42 for all seeds"


def test_rounds_that_were_planned_and_those_that_were_run() -> None:
    done = frame(
        *rounds_of("base", "fedavg", 12), *rounds_of("strategy", "fedp2eft", 15),
        *rounds_of("strategy", "fedl2p", 7, budget=2), *rounds_of("strategy", "fedl2p", 9, budget=4),
    )  # fmt: skip
    assert base_line(configured(rounds=300), done) == "FedAvg, 12 of 30 rounds"
    assert strategy_line(configured(), done) == "15 rounds (FedL2P: 7 to 9)"


def test_a_smaller_run_says_by_how_much() -> None:
    sentence = scale_sentence(configured())
    assert sentence == (
        "Scale 0.1: 2 of 20 clients per language and pool, 10 of 100 base rounds, 15 of 150 strategy rounds."
    )
    assert scale_sentence(configured(1.0)) == ""


@pytest.mark.parametrize(("pretrain", "words"), [
    (None, ""), ({}, ""), ({"vocabulary": 5}, "The model was pretrained."),
    ({"options": {"tasks": ["cldr", "xnli"], "steps": 1200}},
     "The model was pretrained on train texts of cldr, xnli, both pools (1,200 steps)."),
    ({"title": "Toy", "package": "toy==1.0", "licences": ["MIT (model)", "BSD (package)"], "knows": "It reads."},
     "Toy comes in the Python package toy==1.0 (MIT (model); BSD (package)). It reads."),
])  # fmt: skip
def test_a_pretrained_model_says_on_what(pretrain: dict[str, Any] | None, words: str) -> None:
    assert pretrain_sentence(pretrain) == words


@pytest.mark.parametrize(("notes", "words"), [
    ({}, ""), ({"dropped_empty": 3}, ""),
    ({"leak_seen_unseen": 0, "leak_seen_train_test": 0}, "No text is in two pools, or in train and test."),
    ({"found_duplicates": 4, "dropped_duplicates": 4},
     "Repeated texts: 4 test texts are also train texts, all dropped."),
    ({"leak_seen_train_test": 1}, "Repeated texts: 1 text is in train and test of the seen pool."),
])  # fmt: skip
def test_repeated_texts_are_said(notes: dict[str, int], words: str) -> None:
    assert duplicates_sentence(notes) == words


def test_clients_without_a_base_of_their_own_are_counted_per_seed() -> None:
    rows = []
    for seed, missing in ((1, 1), (2, 2)):
        for k in range(4):
            here = {"stage": "personalise", "seed": seed, "pool": "seen", "client": f"c{k}"}
            for method in ("lora", "fedp2eft"):
                rows.append(metric_row(**here, method=method, metric="accuracy", value=0.5, weight=1.0))
                if k < missing:
                    rows.append(metric_row(**here, method=method, metric="initial_overlay", value=1.0))
    assert fallback_sentences(frame(*rows)) == {
        "seen": "1 to 2 of 4 seen clients were never sampled for the base and have its initial private state."
    }


def test_cost_adds_up_seeds_and_divides_by_wall_time() -> None:
    stages = [{"key": f"strategy/fedl2p/r8/seed{seed}"} for seed in (1, 2)] + [{"key": "personalise/lora/seed1"}]
    names = [stage["key"] for stage in stages]
    times = pd.DataFrame([(name, 0, f"c{k}", 2.0) for name in names for k in range(3)], columns=cost_columns())
    events = [
        {"kind": "stage", "stage": name, "state": state, "time": f"2026-01-01T00:00:{second:02d}+00:00"}
        for name, begin, end in ((names[0], 0, 4), (names[1], 10, 14), (names[2], 20, 22), (names[2], 30, 31))
        for state, second in (("running", begin), ("done", end))
    ]
    first, second = summary.cost_table(stages, times, events).to_dict("records")
    assert (first["stage"], first["seeds"], first["clients"]) == ("strategy/fedl2p/r8", 2, 6)
    assert (first["client_seconds"], first["wall_seconds"], first["clients_per_second"]) == (12.0, 8.0, 0.75)
    # Taken up again: its wall time would count the break.
    assert pd.isna(second["wall_seconds"])
    assert pd.isna(second["clients_per_second"])


def cost_columns() -> list[str]:
    return ["stage", "round", "client", "seconds"]


def test_cost_tells_tokens_bytes_memory_and_repeats_and_blanks_where_a_run_did_not_note_them() -> None:
    stages = [{"key": "base/seed1"}, {"key": "personalise/lora/seed1"}]
    costs = [
        ClientCost(5, 60, 4_000_000, 2_000_000, 0, peak_rss=10**9, peak_gpu=0, attempt=0, host="h", pid=1),
        ClientCost(5, 40, 4_000_000, 0, 0, peak_rss=2 * 10**9, peak_gpu=0, attempt=1, host="h", pid=1),
    ]
    new = timings_table("base/seed1", 0, {"a": 1.0, "b": 1.0}, dict(zip("ab", costs, strict=True)))
    old = timings_table("personalise/lora/seed1", 0, {"a": 1.0}, {})
    events = [
        {"kind": "stage", "stage": stage["key"], "state": state, "time": f"2026-01-01T00:00:{second:02d}+00:00"}
        for stage in stages
        for state, second in (("running", 0), ("done", 4))
    ]
    first, second = summary.cost_table(stages, frame_of([new, old], TIMING_SCHEMA), events).to_dict("records")
    assert (first["tokens_per_second"], first["mb_down"], first["mb_up"]) == (25.0, 4.0, 1.0)
    assert (first["peak_rss_mb"], first["peak_gpu_mb"], first["repeated"]) == (2000.0, 0.0, 1.0)
    assert all(pd.isna(second[name]) for name in summary.COST_COLUMNS[-6:])


def test_a_run_without_times_has_no_cost() -> None:
    assert summary.cost_table([{"key": "base/seed1"}], pd.DataFrame(columns=cost_columns()), []).empty
