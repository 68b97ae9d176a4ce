"""Every row of METHODS through every check of the kit, by itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from contract_kit import CHECKS, Bench

from fedtailor.federated.method import MethodEntry
from fedtailor.methods import METHODS


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("bench"))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_keeps(name: str, check: Callable[[MethodEntry, Bench], None], bench: Bench) -> None:
    check(METHODS[name], bench)
