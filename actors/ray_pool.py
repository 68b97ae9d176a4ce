"""The pool that runs segments on Ray actors, lost ones retried; equal to `SerialPool` byte for byte in ``pool`` mode.

In ``per_client`` mode segments are split into single-client jobs and their results merged here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from actors.client_actor import ActorSetup, ClientActor, Host, forwarded_environment
from actors.job_queue import CostModel, JobQueue
from actors.metrics import PoolMetrics
from actors.placement import ActorPlan, plan_actors
from actors.session import RaySession, cluster_nodes, ensure_ray
from actors.supervisor import ActorSlot, ActorSupervisor, Answer
from fedtailor.core.config import resolve
from fedtailor.core.errors import WorkerError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.pool import Meanwhile, OnEvent, OnResult, nothing

WORKER = "fedtailor.worker.worker:Worker"
MERGE = "fedtailor.worker.worker:merge_results"
Accepted = Callable[[int, SegmentResult], None]


def split_by_client(job: SegmentJob) -> list[SegmentJob]:
    """One job per client, in client order, each with its own private state only."""
    if len(job.clients) <= 1:
        return [job]
    return [
        replace(job, clients=(name,), private={k: row for k, row in job.private.items() if k == name})
        for name in job.clients
    ]


class PerClientSplit:
    """Joins a segment's results when the last one is there, in client order whatever came first.

    Args:
        jobs: the segments.
        merge: joins the results of one segment.
        on_result: called once per joined segment.
    """

    def __init__(
        self,
        jobs: Sequence[SegmentJob],
        merge: Callable[[Sequence[SegmentResult]], SegmentResult],
        on_result: OnResult,
    ) -> None:
        self._merge, self._on_result = merge, on_result
        pieces = [split_by_client(job) for job in jobs]
        self.units: list[SegmentJob] = [unit for piece in pieces for unit in piece]
        """All single-client jobs, segment by segment."""
        self._segment = [i for i, piece in enumerate(pieces) for _ in piece]
        self._results_of: list[dict[int, SegmentResult]] = [{} for _ in pieces]
        self._sizes = [len(piece) for piece in pieces]
        self._merged: list[SegmentResult | None] = [None] * len(pieces)

    def add(self, position: int, result: SegmentResult) -> None:
        """Takes the result of ``units[position]``."""
        segment = self._segment[position]
        results = self._results_of[segment]
        results[position] = result
        if len(results) == self._sizes[segment]:
            merged = self._merge([results[i] for i in sorted(results)])
            self._merged[segment] = merged
            results.clear()
            self._on_result(merged)

    def results(self) -> list[SegmentResult]:
        """The joined results in job order."""
        return [result for result in self._merged if result is not None]


class RayPool:
    """Pushes segments to actors, a few calls per round, and survives the loss of any of them.

    In ``pool`` mode the actors are as many as the placement says and share the segments. In ``per_client``
    mode every client of a call has an actor of its own, and a segment's results are merged here, so sums
    agree with ``pool`` mode to rounding only.

    Events are dicts with the key ``event``: ``actor_lost`` (kind: death, oom, node, hang or unreachable;
    cause, host, stack), ``actor_replaced``, ``actor_waiting``, ``pool_shrunk``, ``job_retried``,
    ``result_dropped``.

    Args:
        config: the ``engine`` section.
        on_event: hears of losses and recoveries, as they happen; may be replaced.
        worker: ``module:Class`` that plays segments.
        merge: ``module:function`` that joins the results of a segment's single clients, in client order.
        run: run id, for metrics.

    Raises:
        PlacementError: the actors can never fit, or the cluster cannot be joined.
    """

    def __init__(
        self, config: EngineConfig, on_event: OnEvent, *, worker: str = WORKER, merge: str = MERGE, run: str = ""
    ) -> None:
        # Calls that are given up on purpose are no news; losses are reported as events.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
        self.on_event, self._config, self._run = on_event, config, run
        self._metrics = PoolMetrics(run)
        self._worker, self._merge = worker, merge
        self._costs = CostModel()
        self._round = 0
        self._session: RaySession = ensure_ray(config.address, config.threads)
        try:
            self._nodes = cluster_nodes(gpu_memory=config.memory_gb is not None)
            self._plan: ActorPlan = plan_actors(config, self._nodes, 1 if self._per_client else None)
            self._supervisor = ActorSupervisor(
                self._make_actor, config.deadline_s, config.retries, self._report, all_needed=self._per_client
            )
            self._supervisor.grow(self._plan.count)
        except BaseException:
            self._session.close()
            raise

    @property
    def size(self) -> int:
        """Number of actors now."""
        return len(self._supervisor.slots)

    def hosts(self) -> list[Host]:
        """Where the actors that are up run, by actor number."""
        slots = sorted(self._supervisor.slots, key=lambda slot: slot.number)
        return [slot.host for slot in slots if slot.host is not None]

    def open(self, spec: StageSpec) -> StageInfo:
        """See `Pool.open`; actors that were given up for lack of memory come back here."""
        if not self._per_client:
            self._supervisor.grow(self._plan.count)
        self._metrics.open(spec.key)
        return self._supervisor.open(spec)

    def run(
        self,
        jobs: Sequence[SegmentJob],
        shared: FloatArray | None,
        on_result: OnResult,
        meanwhile: Meanwhile = nothing,
    ) -> list[SegmentResult]:
        """See `Pool.run`."""
        if not self._per_client:
            return self._play(jobs, shared, lambda _, result: on_result(result), meanwhile)
        split = PerClientSplit(jobs, resolve(self._merge), on_result)
        self._plan = plan_actors(self._config, self._nodes, max(1, len(split.units)))
        self._supervisor.grow(self._plan.count)
        self._play(split.units, shared, split.add, meanwhile)
        return split.results()

    def close(self) -> None:
        """Ends the actors, and Ray only if this pool started it."""
        if ray.is_initialized():
            self._supervisor.close()
        self._session.close()

    @property
    def _per_client(self) -> bool:
        return self._config.mode == "per_client"

    def _report(self, event: dict[str, Any]) -> None:
        self._metrics.event(event)
        self.on_event(event)

    def _make_actor(self, number: int) -> Any:
        config, together = self._config, self._plan.ranks > 1
        options: dict[str, Any] = {
            # Who leads ranks takes no place: the ranks do.
            "num_cpus": 0 if together else self._plan.num_cpus,
            "num_gpus": 0 if together else self._plan.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"watch": 1},
        }
        setup = ActorSetup(
            self._worker,
            config.threads,
            forwarded_environment(),
            None if together else self._plan.memory_fraction,
            self._run,
            number,
        )
        if together:
            from actors.zero_group import ZeroGroup  # with torch's process groups, which others need not wait for

            return ray.remote(**options)(ZeroGroup).remote(setup, self._plan, config.zero.deadline_s)
        actor: Any = ray.remote(**options)(ClientActor).remote(setup)
        actor.load.remote()
        return actor

    def _play(
        self, jobs: Sequence[SegmentJob], shared: FloatArray | None, accepted: Accepted, meanwhile: Meanwhile
    ) -> list[SegmentResult]:
        """Runs jobs to the end; on an error calls under way are left to finish unheard."""
        self._round += 1
        queue = JobQueue(jobs, self._costs, self._config.retries)
        reference = None if shared is None or not jobs else ray.put(shared)
        served: set[ActorSlot] = set()
        began = time.monotonic()
        self._feed(queue, reference, served)
        meanwhile()
        while not queue.finished:
            self._feed(queue, reference, served)
            self._metrics.waiting(queue.waiting)
            for answer in self._supervisor.wait():
                self._take(answer, queue, accepted)
        results = queue.results()
        self._metrics.played(sum(len(result.valid) for result in results), time.monotonic() - began)
        return results

    def _feed(self, queue: JobQueue, reference: Any, served: set[ActorSlot]) -> None:
        for slot in self._supervisor.slots:
            if not queue.waiting:
                return
            if not slot.idle or (self._per_client and slot in served):
                continue
            batch = queue.take(self.size, single=self._per_client)
            served.add(slot)
            self._supervisor.submit(slot, [queue.job(i) for i in batch], reference, self._round, batch)

    def _take(self, answer: Answer, queue: JobQueue, accepted: Accepted) -> None:
        slot, call = answer.slot, answer.call
        current = call.round == self._round
        if answer.loss is not None:
            self._supervisor.handle_loss(slot, answer.loss, shrink=not self._per_client)
            if current:
                queue.lose(call.positions, answer.loss)
                for position in call.positions:
                    self._report(_about("job_retried", queue.job(position), slot, answer.loss.kind))
            return
        if not current:
            return
        results = answer.results or []
        if len(results) != len(call.positions):
            raise WorkerError(f"actor {slot.number} answered {len(results)} of {len(call.positions)} segments")
        for position, result in zip(call.positions, results, strict=True):
            if queue.accept(position, result):
                self._metrics.taken(result)
                accepted(position, result)
            else:
                self._report(_about("result_dropped", queue.job(position), slot, "a second result"))


def _about(event: str, job: SegmentJob, slot: ActorSlot, reason: str) -> dict[str, Any]:
    return {
        "event": event, "stage": job.stage, "round": job.round, "segment": job.index,
        "clients": list(job.clients), "attempt": job.attempt,
        "actor": slot.number, "host": str(slot.host or ""), "reason": reason,
    }  # fmt: skip
