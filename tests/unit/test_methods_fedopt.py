"""FedAvgM, FedAdagrad, FedAdam, FedYogi: FedAvg's clients, and servers by the papers' rules and by OpenFedLLM's."""

from __future__ import annotations

import numpy as np
import pytest
from toy import play_rounds

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import validate
from fedtailor.core.errors import ConfigError
from fedtailor.methods import METHODS, build_method
from fedtailor.server_optim.adaptive import AdaptiveServer
from fedtailor.server_optim.sgd import ServerSgd

HOW = {"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "dropout": 0.1}
W = np.array([1.0, -2.0, 0.5], np.float32)
DELTAS = [np.array([0.5, -0.1, 0.0], np.float32), np.array([-0.25, -0.4, 0.3], np.float32)]
ADAPTIVE = ("fedadagrad", "fedadam", "fedyogi")


def fedavg(**more: object) -> list[np.ndarray]:
    targets = {"adapter": "lora", "targets": ["query", "value"]}
    return play_rounds(build_method("fedavg", HOW | targets | more, 3), 3)[0]


def stepped(server: ServerSgd | AdaptiveServer) -> np.ndarray:
    w, state = W, server.init(W)
    for delta in DELTAS:
        w, state = server.step(w, delta, state)
    return w


@pytest.mark.parametrize("first", ["zero", "delta"])
@pytest.mark.parametrize("dampened", [True, False])
def test_fedavgm_without_momentum_is_fedavg(first: str, dampened: bool) -> None:
    cfg = HOW | {"momentum": 0.0, "first_moment": first, "dampened": dampened}
    served, _ = play_rounds(build_method("fedavgm", cfg, 3), 3)
    for found, expected in zip(served, fedavg(), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("name", "own", "same"),
    [
        ("fedavgm", {"momentum": 0.5, "dampened": False}, {"server_momentum": 0.5}),
        ("fedadam", {"server_lr": 0.01}, {"server": "adam", "server_lr": 0.01, "server_momentum": 0.9}),
        ("fedyogi", {"server_lr": 0.01}, {"server": "yogi", "server_lr": 0.01, "server_momentum": 0.9}),
        ("fedadagrad", {"server_lr": 0.01}, {"server": "adagrad", "server_lr": 0.01}),
    ],
    ids=["fedavgm", *ADAPTIVE[1:], "fedadagrad"],
)
def test_by_the_papers_rules_a_row_is_fedavg_with_that_server(
    name: str, own: dict[str, object], same: dict[str, object]
) -> None:
    paper = {"first_moment": "zero", "second_moment": "delta", "weighting": "examples"}
    known = {key: value for key, value in paper.items() if key in METHODS[name].config.model_fields}
    served, _ = play_rounds(build_method(name, HOW | known | own, 3), 3)
    for found, expected in zip(served, fedavg(**same), strict=True):
        np.testing.assert_array_equal(found, expected)
    defaults, _ = play_rounds(build_method(name, HOW | own, 3), 3)
    assert name == "fedavgm" or not np.array_equal(defaults[-1], served[-1]), "the defaults are OpenFedLLM's"


def test_a_dampened_momentum_is_a_mean_of_the_changes() -> None:
    one, two = (d.astype(np.float64) for d in DELTAS)
    np.testing.assert_allclose(stepped(ServerSgd(1.0, 0.9, True, "delta")), W + one + 0.9 * one + 0.1 * two, rtol=1e-5)
    np.testing.assert_allclose(
        stepped(ServerSgd(1.0, 0.9, True, "zero")), W + 0.1 * one + 0.09 * one + 0.1 * two, rtol=1e-5
    )
    assert ServerSgd(1.0, 0.9, True, "delta").init(W) == {}


@pytest.mark.parametrize("second", ["delta", "momentum"])
@pytest.mark.parametrize("first", ["zero", "delta"])
@pytest.mark.parametrize("kind", ["adagrad", "adam", "yogi"])
def test_the_moments_are_made_as_the_switches_say(kind: str, first: str, second: str) -> None:
    server = AdaptiveServer(kind, 0.1, 0.9, 0.99, 1e-3, first, second)  # type: ignore[arg-type]
    ref, m, v = W.astype(np.float64), np.zeros(3), np.full(3, 1e-6)
    for number, delta in enumerate(DELTAS):
        d = delta.astype(np.float64)
        m = d if number == 0 and first == "delta" else 0.9 * m + 0.1 * d
        s = m**2 if second == "momentum" else d**2
        v = {"adagrad": v + s, "adam": 0.99 * v + 0.01 * s, "yogi": v - 0.01 * s * np.sign(v - s)}[kind]
        ref = ref + 0.1 * m / (np.sqrt(v) + 1e-3)
    np.testing.assert_allclose(stepped(server), ref, rtol=1e-4)


def test_defaults_are_openfedllms_where_pfedgpt_is_silent() -> None:
    made = {name: build_method(name, {}, 8) for name in ("fedavgm", *ADAPTIVE)}
    assert made["fedavgm"].server == ServerSgd(1.0, 0.9, dampened=True, first="delta")
    assert made["fedavgm"].aggregator == WeightedMean()
    for name in ADAPTIVE:
        kind, beta1, beta2 = name.removeprefix("fed"), 0.9, 0.99
        if kind == "adagrad":
            beta1, beta2 = 0.0, 0.0
        assert made[name].server == AdaptiveServer(kind, 1e-3, beta1, beta2, 1e-3, "delta", "momentum")  # type: ignore[arg-type]
        assert made[name].aggregator == WeightedMean(uniform=True)
    lora = made["fedadam"].adapter
    assert (lora.rank, lora.scale, lora.targets) == (8, 2.0, ("query", "value"))  # type: ignore[union-attr]


def test_a_decay_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'momentum'.* less than 1"):
        validate(METHODS["fedavgm"].config, {"momentum": 1.0})
