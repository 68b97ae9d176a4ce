"""Counting the operations of a round: attention is counted, and second-order methods cost what they should."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LAYERS, HIDDEN, TOKENS = 2, 128, 512


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program; gone from the modules afterwards."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import flops

    yield flops
    del sys.modules["flops"]


def test_attention_is_counted(bench: Any) -> None:
    """Scores and values, 2 t t h operations each in every layer; linear layers take none away from them."""
    model = bench.roberta_base(LAYERS, HIDDEN, TOKENS).eval()
    ids = torch.full((1, TOKENS), 7)
    linear = 2 * TOKENS * 12 * HIDDEN * HIDDEN * LAYERS
    head = 2 * HIDDEN * (HIDDEN + bench.LABELS)
    attention = 4 * TOKENS * TOKENS * HIDDEN * LAYERS
    with torch.no_grad():
        assert bench.counted(lambda: model(input_ids=ids)) == linear + head + attention
        with FlopCounterMode(display=False) as without:
            model(input_ids=ids)
    assert without.get_total_flops() == linear + head, "if torch counts the CPU's fused kernel now, say so in flops.py"


def test_second_order_methods_cost_the_published_multiples_of_a_step(bench: Any) -> None:
    cost = {name: bench.step_flops(name, bench.roberta_base(LAYERS, HIDDEN, TOKENS)) for name in bench.PUBLISHED}
    for name, (low, high) in bench.BANDS.items():
        assert low <= cost[name] / cost["homlora"] <= high
        assert low <= bench.PUBLISHED[name] / bench.PUBLISHED["homlora"] <= high
    assert cost["homlora"] <= cost["hetlora"] < 1.02 * cost["homlora"], "its adapter has rank 12 instead of 8"
