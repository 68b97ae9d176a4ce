from __future__ import annotations

import numpy as np
import pytest
from ray import exceptions
from ray.core.generated.common_pb2 import ActorDiedErrorContext

from actors.job_queue import CostModel, JobQueue
from actors.ray_errors import ActorLoss, classify_error
from actors.ray_pool import PerClientSplit, split_by_client
from fedtailor.core.errors import WorkerError
from fedtailor.core.messages import SegmentJob, SegmentResult

DEATH = ActorLoss("death", "killed")


def job(index: int, clients: int = 1) -> SegmentJob:
    return SegmentJob("base/seed1", 4, index, tuple(f"c{index}-{i}" for i in range(clients)))


def answer(to: SegmentJob, seconds: float = 1.0) -> SegmentResult:
    share = seconds / len(to.clients)
    return SegmentResult(to.stage, to.round, to.index, to.attempt, seconds=dict.fromkeys(to.clients, share))


def actor_died(message: str) -> exceptions.ActorDiedError:
    return exceptions.ActorDiedError(ActorDiedErrorContext(error_message=message, actor_id=b"1" * 16))


def test_the_largest_segment_goes_first_by_clients_until_seconds_are_known() -> None:
    costs = CostModel()
    queue = JobQueue([job(0), job(1, 3), job(2, 2)], costs, retries=0)
    assert [queue.take(2) for _ in range(3)] == [[1], [2], [0]]
    costs.learn({"c0-0": 9.0, "c1-0": 1.0, "c1-1": 1.0, "c1-2": 1.0})
    again = JobQueue([job(0), job(1, 3), job(2, 2)], costs, retries=0)
    assert [again.take(2) for _ in range(3)] == [[0], [2], [1]]  # 9 s; 2 x 3 s, the mean of those known; 3 s


def test_short_segments_share_a_call_but_leave_work_for_the_others() -> None:
    costs = CostModel()
    costs.learn({f"c{i}-0": 1e-4 for i in range(8)})
    queue = JobQueue([job(i) for i in range(8)], costs, retries=0)
    assert [len(queue.take(2)) for _ in range(4)] == [4, 2, 1, 1]


def test_long_segments_travel_alone() -> None:
    costs = CostModel()
    costs.learn({f"c{i}-0": 1.0 for i in range(4)})
    queue = JobQueue([job(i) for i in range(4)], costs, retries=0)
    assert queue.take(1) == [0]


def test_results_come_back_in_job_order_whatever_came_first() -> None:
    queue = JobQueue([job(0), job(1)], CostModel(), retries=0)
    assert queue.accept(1, answer(queue.job(1)))
    assert not queue.finished
    assert queue.accept(0, answer(queue.job(0)))
    assert queue.finished
    assert [result.index for result in queue.results()] == [0, 1]


def test_a_second_result_is_not_counted() -> None:
    queue = JobQueue([job(0)], CostModel(), retries=1)
    assert queue.accept(0, answer(queue.job(0)))
    assert not queue.accept(0, answer(queue.job(0)))


def test_the_result_of_an_attempt_that_was_given_up_is_not_counted() -> None:
    queue = JobQueue([job(0)], CostModel(), retries=1)
    first = queue.job(0)
    queue.take(1)
    queue.lose([0], DEATH)
    assert (queue.job(0).attempt, queue.take(1)) == (1, [0])
    assert not queue.accept(0, answer(first))
    assert queue.accept(0, answer(queue.job(0)))


def test_an_answer_to_another_job_is_an_error_not_a_guess() -> None:
    queue = JobQueue([job(0), job(1)], CostModel(), retries=0)
    with pytest.raises(WorkerError, match="segment 1 of base/seed1, round 4, when asked for segment 0"):
        queue.accept(0, answer(job(1)))


def test_a_job_lost_too_often_is_named_with_its_clients_and_every_cause() -> None:
    queue = JobQueue([job(0, 7)], CostModel(), retries=1)
    queue.lose(queue.take(1), DEATH)
    with pytest.raises(WorkerError) as error:
        queue.lose(queue.take(1), ActorLoss("oom", "3 GB of 2 GB"))
    for word in ("segment 0 of base/seed1, round 4", "c0-0", "and 2 more", "lost 2 times", "engine.retries=1",
                 "try 1: death: killed", "try 2: oom: 3 GB of 2 GB"):  # fmt: skip
        assert word in str(error.value)


def test_a_lost_job_goes_first_and_alone() -> None:
    costs = CostModel()
    costs.learn({f"c{i}-0": 1e-5 for i in range(8)})
    queue = JobQueue([job(i) for i in range(8)], costs, retries=3)
    queue.lose(queue.take(2), DEATH)
    assert queue.take(2) == [0]


def test_a_segment_splits_into_clients_each_with_its_own_state() -> None:
    rows = {"a": np.ones(2, np.float32), "b": np.zeros(2, np.float32)}
    parts = split_by_client(SegmentJob("s", 0, 5, ("a", "b"), private=rows))
    assert [(part.index, part.clients, list(part.private)) for part in parts] == [
        (5, ("a",), ["a"]),
        (5, ("b",), ["b"]),
    ]


def test_parts_are_joined_in_client_order_and_once() -> None:
    joined: list[SegmentResult] = []

    def merge(parts: object) -> SegmentResult:
        assert isinstance(parts, list)
        return SegmentResult("s", 0, parts[0].index, 0, valid=tuple(name for part in parts for name in part.valid))

    parts = PerClientSplit([SegmentJob("s", 0, 0, ("a", "b")), SegmentJob("s", 0, 1, ("c",))], merge, joined.append)
    for position in (2, 1, 0):
        unit = parts.units[position]
        parts.add(position, SegmentResult("s", 0, unit.index, 0, valid=unit.clients))
    assert [result.valid for result in parts.results()] == [("a", "b"), ("c",)]
    assert [result.index for result in joined] == [1, 0]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            exceptions.OutOfMemoryError("1 worker(s) were killed due to the node running low on memory."),
            "oom",
        ),
        (actor_died("The actor died because its node has died. Node Id: be32"), "node"),
        (exceptions.ActorUnavailableError("rpc timed out", None), "unreachable"),
        (exceptions.WorkerCrashedError(), "death"),
        (actor_died("exited. Some common causes include: (1) killed by the OOM killer"), "death"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_losses_are_told_apart(error: Exception, kind: str) -> None:
    loss = classify_error(error)
    assert isinstance(loss, ActorLoss)
    assert loss.kind == kind
    assert "Some common causes" not in loss.cause
