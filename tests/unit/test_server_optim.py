"""Server optimizers against the update rules of the papers, on three numbers."""

from __future__ import annotations

import numpy as np
import pytest

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.server_optim.adaptive import AdaptiveServer
from fedtailor.server_optim.sgd import ServerSgd

W = np.array([1.0, -2.0, 0.5], np.float32)
DELTAS = [np.array([0.5, -0.1, 0.0], np.float32), np.array([-0.25, -0.4, 0.3], np.float32)]


def test_fedavg_is_sgd_with_rate_one() -> None:
    new, state = ServerSgd().step(W, DELTAS[0], {})
    np.testing.assert_array_equal(new, W + DELTAS[0])
    assert state == {}


def test_momentum_adds_up() -> None:
    server, w = ServerSgd(0.5, 0.9), W
    state = server.init(w)
    for delta in DELTAS:
        w, state = server.step(w, delta, state)
    expected = W + 0.5 * DELTAS[0] + 0.5 * (0.9 * DELTAS[0] + DELTAS[1])
    np.testing.assert_allclose(w, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_adaptive_servers_follow_algorithm_2_of_reddi(kind: str) -> None:
    server, w = AdaptiveServer(kind, 0.1, 0.9, 0.99, 1e-3), W  # type: ignore[arg-type]
    state = server.init(w)
    ref, m, v = W.astype(np.float64), np.zeros(3), np.full(3, 1e-6)
    for delta in DELTAS:
        w, state = server.step(w, delta, state)
        d = delta.astype(np.float64)
        m = 0.9 * m + 0.1 * d
        v = {"adagrad": v + d**2, "adam": 0.99 * v + 0.01 * d**2, "yogi": v - 0.01 * d**2 * np.sign(v - d**2)}[kind]
        ref = ref + 0.1 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(w, ref, rtol=1e-4)
    assert w.dtype == np.float32


def test_the_mean_weighs_by_examples_and_presummed_segments_change_no_byte() -> None:
    rng = np.random.default_rng(0)
    rows, weights = rng.normal(size=(7, 50)).astype(np.float32), [3.0, 1, 8, 2, 2, 9, 4]
    mean = WeightedMean()

    def summed(part: slice) -> object:
        state = mean.zero(50)
        for row, weight in zip(rows[part], weights[part], strict=True):
            state = mean.add(state, row, weight)
        return state

    total = mean.merge(summed(slice(0, 4)), summed(slice(4, 7)))
    again = mean.merge(summed(slice(0, 4)), summed(slice(4, 7)))
    np.testing.assert_array_equal(mean.result(total), mean.result(again))
    np.testing.assert_allclose(mean.result(total), np.average(rows, axis=0, weights=weights), rtol=1e-5, atol=1e-6)
    assert mean.weight(total) == 29


def test_the_mean_of_no_clients_is_an_error() -> None:
    with pytest.raises(ZeroDivisionError):
        WeightedMean().result(WeightedMean().zero(3))
