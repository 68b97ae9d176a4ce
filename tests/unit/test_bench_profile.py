"""The profile of a stage: operators are told apart, and every work is one that the platform can play."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fedtailor.methods import build_method

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The program; gone from the modules afterwards."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    import real_profile

    yield real_profile
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("kind", "work"),
    [
        ("products", lambda x: x @ x),
        ("batched products", lambda x: torch.bmm(x[None], x[None])),
        ("copies, casts", lambda x: x.bfloat16()),
        ("activations, norms, softmax", lambda x: x.softmax(-1)),
        ("additions, multiplications", lambda x: x * x),
        ("other", lambda x: torch.linalg.qr(x)),
    ],
)  # fmt: skip
def test_operators_are_told_apart(bench: Any, kind: str, work: Any) -> None:
    x = torch.randn(400, 400)
    found = bench.shares(lambda: work(x))
    assert sum(found.values()) == pytest.approx(1)
    assert max(found, key=found.__getitem__) == kind


def test_a_stage_is_played_and_its_products_are_counted(bench: Any, tmp_path: Path) -> None:
    work = bench.WORKS["base, LoRA"]
    stage, clients = bench.opened("minilm", work, "float32", "usual", tmp_path)
    rows = stage.data.examples(clients[0], "train").lengths
    run, tokens = bench.played(stage, work, clients[:1]), bench.tokens_of(stage, work, clients[:1])
    assert tokens == rows.sum()
    body = 6 * 12 * 384**2  # weights of six blocks: attention 4 d^2, feed-forward 8 d^2
    assert 2 * 2 * body * tokens < bench.counted(run) < 2 * 2 * body * len(rows) * 64 * 1.3, (
        "forward, and to the inputs"
    )


def test_every_work_is_of_a_known_method(bench: Any) -> None:
    for name, work in bench.WORKS.items():
        method = build_method(work.method, bench._resolved(work, 2), 8)
        assert (method.local_update is not None) or work.kind == "personalise", name
