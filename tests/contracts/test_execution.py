"""A run is deterministic, resumable, reusable and honest about failures, on the serial pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import run_tiny, tiny

from fedtailor.core.errors import ClientError, Interrupted, RoundError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.tokens import TokenData
from fedtailor.worker.worker import SerialPool, Worker


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny(tmp_path_factory.mktemp("clean")))


def digest_of(run: RunFolder) -> str:
    return digest(run.storage, run.run_id)


def test_equal_configurations_give_equal_digests(clean: RunFolder, tmp_path: Path) -> None:
    assert digest_of(run_tiny(tiny(tmp_path), "other-name")) == digest_of(clean)


def test_another_seed_gives_another_digest(clean: RunFolder, tmp_path: Path) -> None:
    assert digest_of(run_tiny(tiny(tmp_path, "seeds=[43]"))) != digest_of(clean)


def test_a_second_run_reuses_every_stage_and_needs_no_pool(clean: RunFolder) -> None:
    def forbidden(_on_event: Any) -> SerialPool:
        raise AssertionError("a pool was made")

    again = run_tiny(tiny(Path(clean.storage.url)), "second", pool=forbidden)
    assert digest_of(again) == digest_of(clean)


def test_a_new_method_reuses_the_base(clean: RunFolder) -> None:
    events: list[dict[str, Any]] = []
    run_tiny(tiny(Path(clean.storage.url), "methods=[lora]", "lora.lr=1e-3"), "third", events=events)
    states = {e["stage"]: e["state"] for e in events if e["kind"] == "stage" and e["state"] in ("reused", "done")}
    assert states == {"base/seed42": "reused", "personalise/lora/seed42": "done"}


@pytest.mark.parametrize("after", [2, 4, 7, 9, 14])
def test_interrupted_and_resumed_is_uninterrupted(clean: RunFolder, tmp_path: Path, after: int) -> None:
    calls = iter(range(10_000))
    exp = tiny(tmp_path)
    with pytest.raises(Interrupted):
        run_tiny(exp, should_stop=lambda: next(calls) >= after)
    assert digest_of(run_tiny(exp)) == digest_of(clean)


def test_every_client_and_budget_is_evaluated_exactly_once(clean: RunFolder) -> None:
    frame = clean.metrics()
    accuracy = frame[(frame.stage == "personalise") & (frame.metric == "accuracy")]
    assert not accuracy.duplicated(["method", "client", "budget"]).any()
    counts = accuracy.groupby(["method", "budget"]).size()
    assert set(counts) == {18}
    assert len(counts) == 2 + 3 * 2


def test_kept_ranks_add_up_to_the_budget_times_the_layers(clean: RunFolder) -> None:
    frame = clean.metrics()
    kept = frame[frame.metric == "kept_rank"]
    sums = kept.groupby(["method", "client", "budget"]).agg(total=("value", "sum"), layers=("module", "nunique"))
    assert (sums.total == sums.index.get_level_values("budget") * sums.layers).all()
    assert set(sums.layers) == {8}


def test_rounds_record_cohort_weights_and_no_clock(clean: RunFolder) -> None:
    from fedtailor.storage.commit_log import CommitLog

    stage = next(s for s in clean.stages() if s["kind"] == "strategy")
    log = CommitLog(clean.storage, f"artifacts/{stage['artifact']}")
    for commit in log.all(objects=False):
        assert set(commit.record) == {"kind", "cohort", "weights", "rejected", "private_at"}
        assert len(commit.record["cohort"]) == len(set(commit.record["cohort"])) == 5
        assert set(commit.record["weights"]) == set(commit.record["cohort"])


class Saboteur(SerialPool):
    """Spoils the data or the update of one client."""

    def __init__(self, config: Any, on_event: Any, spoil: str, how: str) -> None:
        super().__init__(config, on_event)
        self.spoil, self.how = spoil, how

    def run(self, *call: Any, **named: Any) -> list[SegmentResult]:
        stage = self._worker._stage
        assert stage is not None
        original, spoil, how = type(stage).context, self.spoil, self.how

        def context(this: Any, clients: Sequence[str], *rest: Any) -> Any:
            ctx = original(this, clients, *rest)
            guilty = [k for k, client in enumerate(clients) if spoil in ("*", client)]
            if guilty and how == "raise":
                raise RuntimeError("spoilt client")
            for k in guilty:
                from fedtailor.core.scope import Scope

                ctx.params.flat(Scope.SHARED)[k] = float("nan")
            return ctx

        type(stage).context = context  # type: ignore[method-assign]
        try:
            return super().run(*call, **named)
        finally:
            type(stage).context = original  # type: ignore[method-assign]


def sabotaged(exp: Any, spoil: str, how: str, events: list[dict[str, Any]] | None = None) -> RunFolder:
    return run_tiny(exp, pool=lambda on_event: Saboteur(exp.engine, on_event, spoil, how), events=events)


ONLY_ROUNDS = ("methods=[base]", "base.cohort=9", "base.rounds=1", "fedavg.adapter=lora")


def test_a_client_with_nan_is_rejected_named_and_counted(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    sabotaged(tiny(tmp_path, *ONLY_ROUNDS), "seen/amh/00", "nan", events)
    [failure] = [e for e in events if e["kind"] == "failure"]
    assert (failure["client"], failure["failure"]) == ("seen/amh/00", "rejected")
    assert "NaN" in failure["reason"]


def test_a_round_without_a_valid_update_is_not_committed(tmp_path: Path) -> None:
    exp = tiny(tmp_path, *ONLY_ROUNDS)
    with pytest.raises(RoundError, match="0 of 9 updates are valid"):
        sabotaged(exp, "*", "nan")
    assert not list((tmp_path / "artifacts").glob("base-*/rounds/*/COMMIT.json"))


def test_a_failing_client_is_named_although_it_ran_in_a_group(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match=r"client seen/amh/01, base/seed42, round 0: RuntimeError: spoilt"):
        sabotaged(tiny(tmp_path, *ONLY_ROUNDS), "seen/amh/01", "raise")


def test_with_drop_the_round_goes_on_without_it(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run = sabotaged(tiny(tmp_path, *ONLY_ROUNDS, "engine.on_client_failure=drop"), "seen/amh/01", "raise", events)
    assert {e["client"] for e in events if e["kind"] == "failure"} == {"seen/amh/01"}
    frame = run.metrics()
    assert len(frame[(frame.stage == "base") & (frame.metric == "train_loss")]) == 8


def test_workers_never_hand_out_or_keep_live_weights(tmp_path: Path) -> None:
    exp = tiny(tmp_path, *ONLY_ROUNDS)
    kept: list[tuple[FloatArray, FloatArray]] = []

    class Poisoner(SerialPool):
        def run(
            self, jobs: Sequence[SegmentJob], shared: FloatArray | None, *rest: Any, **named: Any
        ) -> list[SegmentResult]:
            if shared is None:
                return super().run(jobs, shared, *rest, **named)
            first = Worker.run(self._worker, jobs[0], shared)
            total = first.partial.total.copy()
            # Whatever is done to an answer or to the broadcast must not reach the next call.
            first.partial.total[:] = 1e9
            poisoned = shared.copy()
            again = Worker.run(self._worker, jobs[0], poisoned)
            poisoned[:] = np.nan
            kept.append((total, again.partial.total))
            return super().run(jobs, shared, *rest, **named)

    run_tiny(exp, pool=lambda on_event: Poisoner(exp.engine, on_event))
    for first, again in kept:
        np.testing.assert_array_equal(first, again)


def test_a_client_that_fails_at_one_budget_leaves_no_row_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtailor.worker import scoring

    honest = scoring.evaluate

    def second_budget_breaks(*arguments: Any) -> Any:
        scores = honest(*arguments)
        return [scores[0], replace(scores[1], loss_sum=float("nan")), *scores[2:]]

    monkeypatch.setattr(scoring, "evaluate", second_budget_breaks)
    overrides = ("methods=[lora]", "engine.on_client_failure=drop", "engine.token_budget=100000", "save_adapters=true")
    run = run_tiny(tiny(tmp_path, "base.rounds=1", *overrides))
    frame = run.metrics("personalise")
    rows = frame[frame.metric == "accuracy"].groupby("client").size()
    assert set(rows) == {2}
    assert 0 < len(rows) < 18


def test_a_clients_tokens_are_those_that_its_training_steps_read(clean: RunFolder) -> None:
    """Over all epochs and budgets; none where nothing is trained."""
    data = TokenData.open(next((Path(clean.storage.url) / "artifacts").glob("tokens-*")))
    times = clean.timings()
    times["passes"] = times["tokens"] / times["client"].map(lambda client: data.entry(client)["train_tokens"])
    passes = {stage: set(rows["passes"]) for stage, rows in times.groupby("stage")}
    budgets = 2
    assert passes == {
        "base/seed42": {1},
        "strategy/fedp2eft/seed42": {1},
        "personalise/majority/seed42": {0},
        "personalise/base/seed42": {0},
        "personalise/lora/seed42": {1 * budgets},
        "personalise/bayestune_lora/seed42": {1 + 1 * budgets},
        "personalise/fedp2eft/seed42": {1 * budgets},
    }


def test_a_run_that_reuses_everything_tells_its_unknown_tokens_too(clean: RunFolder) -> None:
    artifacts = Path(clean.storage.url) / "artifacts"
    counts = clean.info()["unknown_tokens"]
    assert list(counts) == [next(artifacts.glob("tokens-*")).name]
    assert set(next(iter(counts.values()))) == {"amh", "eng", "yor"}
    again = run_tiny(tiny(Path(clean.storage.url)), "reused")
    assert again.info()["unknown_tokens"] == counts
