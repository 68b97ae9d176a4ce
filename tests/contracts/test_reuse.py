"""What is computed once: a base that methods share, and the features of each client on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tiny import run_tiny, tiny

from fedtailor.lanes import features
from fedtailor.methods import METHODS


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counter[bytes]:
    """Counts computations of features by the client's texts."""
    counts: Counter[bytes] = Counter()
    plain = features.client_features

    def counting(net: Any, examples: Any, *rest: Any) -> Any:
        counts[examples.input_ids.tobytes()] += 1
        return plain(net, examples, *rest)

    monkeypatch.setattr(features, "client_features", counting)
    return counts


def test_the_second_round_and_the_second_method_compute_no_features(tmp_path: Path, computed: Counter[bytes]) -> None:
    few = ("budgets=[1]", "personalise.pools=[seen]", "strategy.cohort=9", "base.rounds=1")
    run_tiny(tiny(tmp_path, *few, "methods=[fedp2eft]", "strategy.rounds=1"), run_id="one")
    assert len(computed) == 9
    assert set(computed.values()) == {1}, "the personalising stage reads what the strategy stage computed"
    run_tiny(tiny(tmp_path, *few, "methods=[fedp2eft,fedl2p]", "strategy.rounds=3"), run_id="three")
    assert set(computed.values()) == {1}, "neither more rounds nor another method compute them again"


def test_every_further_method_reuses_the_base(tmp_path: Path) -> None:
    few = ("budgets=[1]", "personalise.pools=[seen]", "base.rounds=1", "strategy.rounds=1", "fedl2p.outer_steps=1")
    run_tiny(tiny(tmp_path, *few, "methods=[base]"), run_id="first")
    for name in METHODS:
        events: list[dict[str, Any]] = []
        run_tiny(tiny(tmp_path, *few, f"methods=[{name}]"), run_id=name, events=events)
        states = {e["stage"]: e["state"] for e in events if e["kind"] == "stage"}
        assert states["base/seed42"] == "reused", name
