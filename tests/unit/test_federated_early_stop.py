"""Federated early stopping: patience, the best round's parameters, and a record that is committed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedtailor.federated.method import EarlyStop, best_of, without_record


def rows(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    other = [{"metric": "train_loss", "value": 100.0, "weight": 1.0}]
    return other + [{"metric": "val_loss", "value": value, "weight": weight} for value, weight in pairs]


def play(rule: EarlyStop, values: list[float]) -> tuple[int, dict[str, np.ndarray]]:
    """Rounds done when the rule stops (or all), and the server's state then."""
    state: dict[str, np.ndarray] = {"m": np.ones(2, np.float32)}
    for round, value in enumerate(values):
        if rule.reached(state):
            return round, state
        state = without_record(state) | rule.follow(np.full(2, round, np.float32), state, rows((value, 3.0)))
    return len(values), state


def test_it_stops_after_patience_rounds_without_a_new_lowest_value() -> None:
    done, state = play(EarlyStop("val_loss", 3), [1.0, 0.8, 0.9, 0.8, 0.85, 0.1])
    assert done == 5, "0.8 came in round 1; rounds 2, 3 and 4 were not lower"
    assert best_of(state, np.zeros(2, np.float32)).tolist() == [1.0, 1.0]
    assert state["m"].tolist() == [1.0, 1.0]


def test_it_runs_on_while_values_fall() -> None:
    done, state = play(EarlyStop("val_loss", 1), [5.0, 4.0, 3.0, 2.0])
    assert done == 4
    assert best_of(state, np.zeros(2, np.float32)).tolist() == [3.0, 3.0]


def test_the_value_is_the_mean_over_the_cohort_weighted_by_examples() -> None:
    state = EarlyStop("val_loss", 1).follow(np.zeros(1, np.float32), {}, rows((1.0, 3.0), (5.0, 1.0)))
    assert float(state["early_stop.value"][0]) == 2.0


def test_a_metric_that_nobody_reports_is_an_error() -> None:
    with pytest.raises(ValueError, match="'val_loss'"):
        EarlyStop("val_loss", 1).follow(np.zeros(1, np.float32), {}, rows())


def test_without_a_record_the_newest_parameters_are_used() -> None:
    newest = np.arange(3, dtype=np.float32)
    assert best_of({}, newest) is newest
