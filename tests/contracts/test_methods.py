"""Every row of METHODS through every check of the kit, by itself, on texts and, where it can, on spans."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from contract_kit import (
    CHECKS,
    ROUNDS,
    Bench,
    every_client_gets_a_model,
    private_state_comes_back_and_is_used,
)
from squad_case import SPANS, write_squad

from fedtailor.experiment.compose import compose
from fedtailor.federated.method import Capability, MethodEntry
from fedtailor.methods import METHODS, build_method

MARKING = [
    name for name in METHODS if Capability.CLASSES not in build_method(name, METHODS[name].tiny or {}, 2).requires
]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def spans(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("spans")
    path = write_squad(root / "squad" / "train-v2.0.json")
    own = (f"storage={root}", f"task.path={path}", "methods=[base]", f"strategy.rounds={ROUNDS}")
    return Bench.make(root, compose([], [*SPANS, *own]))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps(name: str, check: Callable[[MethodEntry, Bench], None], bench: Bench) -> None:
    check(METHODS[name], bench)


@pytest.mark.parametrize("name", MARKING)
def test_every_client_gets_a_model_of_spans(name: str, spans: Bench) -> None:
    every_client_gets_a_model(METHODS[name], spans)


@pytest.mark.parametrize("name", ["dept", "pf2lora"])
def test_private_state_is_used_on_spans(name: str, spans: Bench) -> None:
    private_state_comes_back_and_is_used(METHODS[name], spans)
