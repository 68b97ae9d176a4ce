"""The driver commits a round while the workers play the next one, and concludes nothing before that commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedtailor.core.errors import ClientError, StorageError, WorkerError
from fedtailor.core.messages import Row, SegmentJob, SegmentResult
from fedtailor.federated.method import Method
from fedtailor.federated.pool import Meanwhile
from fedtailor.federated.rounds import RoundOutcome, RoundPlan, RoundState, run_rounds
from fedtailor.methods import build_method

CLIENTS = ("a", "b")
START = np.zeros(3, np.float32)


class Diary:
    """A pool and a round log that write down who did what, in order.

    Args:
        private: PRIVATE numbers that every client sends back.
        fails_at: name of an entry that ends in an error instead.
    """

    def __init__(self, private: int = 0, fails_at: str = "") -> None:
        self.entries: list[str] = []
        self.kept: list[RoundOutcome] = []
        self._private, self._fails_at = private, fails_at

    def run(
        self, jobs: Sequence[SegmentJob], shared: Row | None, on_result: Any, meanwhile: Meanwhile
    ) -> list[SegmentResult]:
        round = jobs[0].round
        self._write(f"start {round}", WorkerError("no actor left"))
        meanwhile()
        self._write(f"end {round}", WorkerError("an actor died too often"))
        return [self._answer(job, shared) for job in jobs]

    def newest(self) -> RoundState | None:
        return None

    def private(self, client: str, round: int) -> Row:
        assert round in {outcome.state.round - 1 for outcome in self.kept}, "read before it was committed"
        return self.kept[round].private[client]

    def commit(self, outcome: RoundOutcome) -> None:
        self._write(f"commit {outcome.state.round - 1}", StorageError("the disk is full"))
        self.kept.append(outcome)

    def _write(self, entry: str, error: Exception) -> None:
        if entry == self._fails_at:
            raise error
        self.entries.append(entry)

    def _answer(self, job: SegmentJob, shared: Row | None) -> SegmentResult:
        assert shared is not None
        result = SegmentResult(job.stage, job.round, job.index, job.attempt, valid=job.clients)
        mean = METHOD.aggregator
        result.partial = mean.zero(shared.size)
        for client in job.clients:
            result.partial = mean.add(result.partial, shared + 1, 1.0)
            if self._private:
                result.private[client] = np.full(self._private, job.round, np.float32)
        return result


METHOD = build_method("fedavg", {}, 1)


def play(diary: Diary, method: Method = METHOD, rounds: int = 3, told: list[int] | None = None) -> RoundState:
    plan = RoundPlan("base/seed0", 0, rounds, CLIENTS, dict.fromkeys(CLIENTS, 1), len(CLIENTS), 8, 1)
    on_round = (lambda outcome: None) if told is None else (lambda outcome: told.append(outcome.state.round))
    return run_rounds(plan, method, diary, START, diary, lambda result: None, on_round)  # type: ignore[arg-type]


def test_a_round_is_committed_while_the_next_one_is_played() -> None:
    diary, told = Diary(), list[int]()
    state = play(diary, told=told)
    assert diary.entries == [
        "start 0", "end 0", "start 1", "commit 0", "end 1", "start 2", "commit 1", "end 2", "commit 2",
    ]  # fmt: skip
    assert told == [1, 2, 3]
    np.testing.assert_array_equal(state.shared, START + 3)
    assert [outcome.state.round for outcome in diary.kept] == [1, 2, 3]


def test_private_state_is_committed_before_the_next_round_begins() -> None:
    diary = Diary(private=2)
    play(diary)
    assert diary.entries == [
        "start 0",
        "end 0",
        "commit 0",
        "start 1",
        "end 1",
        "commit 1",
        "start 2",
        "end 2",
        "commit 2",
    ]


def test_a_release_is_committed_before_the_next_round_begins() -> None:
    from fedtailor.federated.release import NoisedAggregate

    def mechanism(total: Any, shared: Row, cohort: int, round_id: Any, draw: int) -> NoisedAggregate:
        return NoisedAggregate(METHOD.aggregator.result(total))

    mechanism.fingerprint = lambda total: ""  # type: ignore[attr-defined]
    diary = Diary()
    play(diary, replace(METHOD, mechanism=mechanism), rounds=2)  # type: ignore[arg-type]
    assert diary.entries == ["start 0", "end 0", "commit 0", "start 1", "end 1", "commit 1"]


def test_a_commit_that_fails_ends_the_run_before_the_next_round_is_concluded() -> None:
    diary, told = Diary(fails_at="commit 1"), list[int]()
    with pytest.raises(StorageError, match="disk is full"):
        play(diary, told=told)
    assert diary.entries == ["start 0", "end 0", "start 1", "commit 0", "end 1", "start 2"]
    assert told == [1]


@pytest.mark.parametrize("moment", ["start 1", "end 1"])
def test_a_round_that_is_done_is_kept_when_the_next_one_is_lost(moment: str) -> None:
    diary, told = Diary(fails_at=moment), list[int]()
    with pytest.raises(WorkerError):
        play(diary, told=told)
    assert told == [1]
    assert diary.entries[-1] == "commit 0"


def test_a_round_that_is_done_is_kept_when_the_next_one_cannot_be_closed() -> None:
    class Silent(Diary):
        def _answer(self, job: SegmentJob, shared: Row | None) -> SegmentResult:
            result = super()._answer(job, shared)
            return result if job.round == 0 else replace(result, partial=None, valid=())

    diary = Silent()
    with pytest.raises(ClientError):
        play(diary)
    assert [outcome.state.round for outcome in diary.kept] == [1]
