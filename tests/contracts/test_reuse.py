"""What is computed once: a base that methods share, and the features of each client on it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from contract_kit import tiny_section
from tiny import run_tiny, tiny

from fedtailor.experiment.config import method_section
from fedtailor.experiment.execute import Execution
from fedtailor.experiment.launch import load_experiment
from fedtailor.experiment.stages import named_by
from fedtailor.lanes import features
from fedtailor.methods import METHODS
from fedtailor.storage.digest import stage_digests
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder


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
    run_tiny(tiny(tmp_path, *few, "methods=[fedp2eft]", "strategy.rounds=1", "fedp2eft.psg.features_eps=1"), "eps")
    assert set(computed.values()) == {1}, "the cache holds variances, which serve every eps"
    one, eps = (stage_digests(Storage(str(tmp_path)), run_id) for run_id in ("one", "eps"))
    assert {key for key in one if one[key] != eps[key]} == {"strategy/fedp2eft/seed42", "personalise/fedp2eft/seed42"}


def test_a_run_from_before_a_key_is_resumed_with_what_was_done_then(tmp_path: Path) -> None:
    few = ("budgets=[1]", "personalise.pools=[seen]", "base.rounds=1", "strategy.rounds=1", "methods=[fedp2eft]")
    run = run_tiny(tiny(tmp_path, *few, "fedp2eft.psg.features_eps=0"), run_id="old")
    before = {stage["key"]: stage["artifact"] for stage in run.stages()}
    info = run.info()
    del info["config"]["fedp2eft"]["psg"]["features_eps"]
    run.storage.write_json("old/run.json", info)
    exp = load_experiment(RunFolder.open(run.storage, "old"))
    assert exp == tiny(tmp_path, *few, "fedp2eft.psg.features_eps=0")
    assert "features_eps" not in str(named_by(method_section(exp, "fedp2eft")))
    events: list[dict[str, Any]] = []
    Execution(exp, run, _no_pool, events.append, lambda: False).execute()
    assert {e["state"] for e in events if e["kind"] == "stage"} == {"preparing", "reused"}
    new = run_tiny(tiny(tmp_path, *few), run_id="new")
    after = {stage["key"]: stage["artifact"] for stage in new.stages()}
    assert tiny(tmp_path, *few).fedp2eft.psg.features_eps == 1e-5  # type: ignore[attr-defined]
    assert [key for key in before if before[key] == after[key]] == ["base/seed42"]


def _no_pool(_: Any) -> Any:
    raise AssertionError("a finished run needs no pool")


def test_every_further_method_reuses_the_base(tmp_path: Path) -> None:
    few = ("budgets=[1]", "personalise.pools=[seen]", "base.rounds=1", "strategy.rounds=1", "fedl2p.outer_steps=1")
    run_tiny(tiny(tmp_path, *few, "methods=[base]"), run_id="first")
    for name in METHODS:
        # With defaults, but for methods that tune on a pool of rows, which this task has not.
        own = tiny_section(name, METHODS[name].tiny or {}) if name.startswith(("mix_", "fdlora", "pfedgpt")) else []
        events: list[dict[str, Any]] = []
        run_tiny(tiny(tmp_path, *few, f"methods=[{name}]", *own), run_id=name, events=events)
        states = {e["stage"]: e["state"] for e in events if e["kind"] == "stage"}
        assert states["base/seed42"] == "reused", name
