"""Every example in a docstring says the truth."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

LIBRARY = Path(__file__).parents[2] / "platform/fedtailor"
MODULES = sorted(
    ".".join(["fedtailor", *path.relative_to(LIBRARY).with_suffix("").parts])
    for path in LIBRARY.rglob("*.py")
    if ">>>" in path.read_text("utf-8")
)


def test_there_are_examples() -> None:
    assert len(MODULES) >= 8


@pytest.mark.parametrize("name", MODULES)
def test_examples_of(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
