"""Privacy in a whole run: neutral when it is off, written down before it is spent, the same when it is resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import run_tiny, tiny

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.errors import Interrupted, RoundError
from fedtailor.experiment import execute
from fedtailor.experiment.launch import load_experiment
from fedtailor.federated.method import Method
from fedtailor.federated.release import PrivacySpend
from fedtailor.methods.build import build_server_side
from fedtailor.privacy.central_dp import GaussianMechanism
from fedtailor.report.facts import privacy_sentence
from fedtailor.storage.digest import digest
from fedtailor.storage.journal import LEDGER, PrivacyLedger
from fedtailor.storage.run_folder import RunFolder
from fedtailor.worker import open_stage

SMALL = (
    "methods=[fedp2eft]", "budgets=[1]", "base.rounds=2", "strategy.rounds=2", "fedavg.adapter=lora",
    "personalise.pools=[unseen]", "task.clients_per_language=2", "base.cohort=4", "strategy.cohort=4",
)  # fmt: skip
NOISY = (*SMALL, "privacy=central_dp", "privacy.clip=0.05", "privacy.noise_multiplier=0.1")
BASE = (*SMALL, "methods=[base]")
MASKS = ("privacy.secure_aggregation=secagg", "privacy.secagg.step=1e-9")


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny(tmp_path_factory.mktemp("noisy"), *NOISY))


def weights(run: RunFolder, stage: str) -> list[dict[str, np.ndarray]]:
    """SHARED parameters after the newest rounds of a stage."""
    [found] = [s for s in run.stages() if s["kind"] == stage]
    return [dict(commit.tensors(execute.SHARED)) for commit in run.log(found).all()[-2:]]


def uniformly(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*arguments: Any) -> Method:
        return replace(build_server_side(*arguments), aggregator=WeightedMean(uniform=True))

    monkeypatch.setattr(open_stage, "build_server_side", build)
    monkeypatch.setattr(execute, "build_server_side", build)


def lines(run: RunFolder) -> dict[str, list[dict[str, Any]]]:
    """Each round stage's ledger."""
    folders = {s["kind"]: s["artifact"] for s in run.stages() if s["rounds"]}
    texts = {kind: run.storage.read_bytes(f"artifacts/{name}/{LEDGER}").decode() for kind, name in folders.items()}
    return {kind: [json.loads(line) for line in text.splitlines()] for kind, text in texts.items()}


def test_without_noise_and_clip_a_run_is_the_uniformly_weighted_one_to_the_last_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    neutral = run_tiny(tiny(tmp_path / "dp", *SMALL, "privacy=central_dp", "privacy.noise_multiplier=0"))
    uniformly(monkeypatch)
    plain = run_tiny(tiny(tmp_path / "plain", *SMALL))
    for stage in ("base", "strategy"):
        for one, other in zip(weights(neutral, stage), weights(plain, stage), strict=True):
            assert {name: row.tobytes() for name, row in one.items()} == {n: r.tobytes() for n, r in other.items()}
    assert {entry["epsilon"] for kind in lines(neutral).values() for entry in kind} == {None}


def test_epsilon_grows_over_the_stages_and_is_committed_with_every_round(noisy: RunFolder) -> None:
    written = lines(noisy)
    epsilons = [entry["epsilon"] for kind in ("base", "strategy") for entry in written[kind]]
    assert epsilons == sorted(epsilons)
    assert len(set(epsilons)) == 4
    rows = noisy.metrics()
    rows = rows[(rows.metric == "epsilon") & (rows.client == "")]
    assert sorted(rows.value) == epsilons
    for stage in noisy.stages():
        if stage["rounds"]:
            records = [commit.record for commit in noisy.log(stage).all()]
            assert [r["privacy"]["epsilon"] for r in records] == [e["epsilon"] for e in written[stage["kind"]]]
            assert {weight for r in records for weight in r["weights"].values()} == {1.0}


def test_the_ledger_has_a_round_before_its_noise_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    drawn = GaussianMechanism.noise

    def watched(self: GaussianMechanism, size: int, round_id: Any, draw: int) -> Any:
        [path] = [p for p in tmp_path.glob(f"artifacts/*/{LEDGER}") if p.parent.name.startswith(round_id.kind)]
        seen.append((round_id.round, len(path.read_text().splitlines())))
        return drawn(self, size, round_id, draw)

    monkeypatch.setattr(GaussianMechanism, "noise", watched)
    run_tiny(tiny(tmp_path, *NOISY))
    assert seen == [(0, 1), (1, 2)] * 2


def test_interrupted_and_resumed_is_uninterrupted_and_spends_nothing_twice(noisy: RunFolder, tmp_path: Path) -> None:
    calls = iter(range(1000))
    exp = tiny(tmp_path, *NOISY)
    with pytest.raises(Interrupted):
        run_tiny(exp, should_stop=lambda: next(calls) >= 5)
    again = run_tiny(exp)
    assert digest(again.storage, again.run_id) == digest(noisy.storage, noisy.run_id)
    assert lines(again) == lines(noisy)


def test_a_crash_between_ledger_and_commit_releases_the_same_bytes_and_spends_nothing_twice(
    noisy: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = PrivacyLedger.record_spend, iter(range(1000))

    def crash(self: PrivacyLedger, round: int, fingerprint: str) -> PrivacySpend:
        draw = honest(self, round, fingerprint)
        if next(calls) == 1:
            raise OSError("power cut")
        return draw

    exp = tiny(tmp_path, *NOISY)
    monkeypatch.setattr(PrivacyLedger, "record_spend", crash)
    with pytest.raises(OSError, match="power cut"):
        run_tiny(exp)
    again = run_tiny(exp)
    assert digest(again.storage, again.run_id) == digest(noisy.storage, noisy.run_id)
    assert lines(again) == lines(noisy)


def test_the_report_names_epsilon_and_what_it_does_not_cover(noisy: RunFolder) -> None:
    sentence = privacy_sentence(load_experiment(noisy), noisy.metrics())
    last = lines(noisy)["strategy"][-1]["epsilon"]
    assert f"{last:.3g} (FedP²EFT)" in sentence
    assert f"at delta = {lines(noisy)['base'][0]['delta']:.2g}" in sentence
    assert "Not covered: personalised adapters" in sentence


def test_poisson_cohorts_run_to_the_end_even_when_one_is_empty(tmp_path: Path) -> None:
    overrides = ("methods=[base]", "privacy.sampler=poisson", "base.cohort=2", "base.rounds=8")
    run = run_tiny(tiny(tmp_path, *NOISY, *overrides))
    [base] = [s for s in run.stages() if s["kind"] == "base"]
    sizes = [len(commit.record["cohort"]) for commit in run.log(base).all()]
    assert 0 in sizes
    assert len(set(sizes)) > 2


def test_under_masks_a_run_gives_the_plain_weights_up_to_the_step(tmp_path: Path) -> None:
    masked, plain = (run_tiny(tiny(tmp_path / name, *how)) for name, how in (("m", (*BASE, *MASKS)), ("p", BASE)))
    for one, other in zip(weights(masked, "base"), weights(plain, "base"), strict=True):
        for name in one:
            np.testing.assert_allclose(one[name], other[name], atol=1e-5)
    rows = masked.metrics()
    assert (rows[rows.metric == "secagg_up_bytes"].value > 0).all()


def test_vanished_clients_are_listed_leave_nothing_behind_and_too_many_end_the_run(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    lossy = (*BASE, *MASKS, "base.cohort=6")
    run = run_tiny(tiny(tmp_path, *lossy, "privacy.secagg.dropout=0.34"), events=events)
    gone = [(e["stage"], e["round"], e["client"]) for e in events if e["kind"] == "failure"]
    assert len(gone) == 4
    rows = run.metrics()
    told = set(zip(rows.stage, rows["round"], rows.client, strict=True))
    assert not {(stage.split("/")[0], number, client) for stage, number, client in gone} & told
    with pytest.raises(RoundError, match="cannot be recovered"):
        run_tiny(tiny(tmp_path, *lossy, "privacy.secagg.dropout=0.5"), "lost")


def test_another_privacy_is_another_artifact_and_none_leaves_the_names_as_they_were(tmp_path: Path) -> None:
    from fedtailor.experiment.stages import Inputs, plan_stages

    inputs = Inputs("data-1", "model-1", "tokens-1")

    def names(*overrides: str) -> list[str]:
        return [stage.artifact for stage in plan_stages(tiny(tmp_path, *SMALL, *overrides), 42, inputs, 6)]

    noise = ("privacy=central_dp", "privacy.clip=0.05", "privacy.noise_multiplier=0.1")
    assert names("privacy=none") == names()
    assert not set(names(*noise)) & set(names())
    target = names("privacy=central_dp", "privacy.clip=0.05", "privacy.target_epsilon=50")
    assert target != names(*noise)
