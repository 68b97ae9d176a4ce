"""A client that needs several processes: N ranks in one placement group that look like one actor of the pool.

DeepSpeed ZeRO (Rajbhandari et al., SC 2020) spreads the frozen base over the ranks; see
`fedtailor.models.zero`. All ranks run the same segments; each has its rows of every step. The group lives and
dies as a whole: a rank that is lost, hangs or falls out of step ends all of them, the pool starts a new group, and the
segment is played again from what the last commit left.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NoReturn

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.client_actor import ActorSetup, Host, here
from actors.placement import ActorPlan
from actors.ray_errors import ActorLoss, GroupLostError, classify_error
from actors.zero_rank import RankAnswer, ZeroRank
from fedtailor.core.errors import PlacementError, TailorError, WorkerError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec

START_S = 120.0
"""Seconds until ranks that Ray does not place are an error."""

CAUSE_S = 3.0
"""How long a rank's error waits for the death of another rank that may have caused it."""

STACK_S = 3.0


class ZeroGroup:
    """Has the methods of `actors.client_actor.ClientActor`; holds no model and needs no CPU itself.

    Args:
        setup: worker, threads of a rank, and place in the pool.
        plan: size of a rank, and how many there are.
        deadline_s: seconds that ranks may wait for each other.
    """

    def __init__(self, setup: ActorSetup, plan: ActorPlan, deadline_s: float) -> None:
        self._setup, self._plan, self._deadline_s = setup, plan, deadline_s
        self._ranks: list[Any] = []
        self._spec: StageSpec | None = None
        self._own: PlacementGroup | None = None

    def open(self, spec: StageSpec) -> str:
        """Opens a stage on all ranks; starts them if they are not there, or hold another base."""
        from fedtailor.worker.worker import same_base

        if self._spec is not None and not same_base(self._spec, spec):
            # DeepSpeed cannot let go of a model that it has partitioned.
            self._disband()
        if not self._ranks:
            self._assemble(spec.engine.device)
        self._spec = spec
        fingerprints = set(self._all([rank.open.remote(spec) for rank in self._ranks]))
        if len(fingerprints) != 1:
            raise WorkerError(f"the ranks opened {spec.key} with {len(fingerprints)} different initial states")
        return str(fingerprints.pop())

    def info(self) -> StageInfo | None:
        """The stage info of rank 0; all ranks have the same."""
        info: StageInfo | None = ray.get(self._ranks[0].info.remote())
        return info

    def run(self, jobs: Sequence[SegmentJob], shared: FloatArray | None) -> list[SegmentResult]:
        """Plays segments on all ranks; the answer is rank 0's, if all have the same.

        Raises:
            GroupLostError: a rank was lost; the others are ended.
            WorkerError: the ranks computed different things.
        """
        reference = None if shared is None else ray.put(shared)
        answers: list[RankAnswer] = self._all([rank.play.remote(list(jobs), reference) for rank in self._ranks])
        first = answers[0]
        for index, answer in enumerate(answers):
            if answer.hashes != first.hashes:
                self._disband()
                raise WorkerError(
                    f"rank {index} of a group of {len(answers)} has another result than rank 0 for {jobs[0].stage}, "
                    f"round {jobs[0].round}: nothing of it is kept"
                )
        assert first.results is not None
        return first.results

    @ray.method(concurrency_group="watch")
    def host(self) -> Host:
        """Pid and node of the process that leads the group."""
        return here()

    @ray.method(concurrency_group="watch")
    def ranks(self) -> list[Host]:
        """Where the ranks run."""
        hosts: list[Host] = ray.get([rank.host.remote() for rank in self._ranks], timeout=STACK_S)
        return hosts

    @ray.method(concurrency_group="watch")
    def stack(self) -> str:
        """What every rank does now."""
        refs = [rank.stack.remote() for rank in self._ranks]
        done = set(ray.wait(refs, num_returns=len(refs), timeout=STACK_S / 2)[0]) if refs else set()
        texts = [ray.get(ref) if ref in done else "no stack" for ref in refs]
        return "\n".join(f"rank {index}:\n{text}" for index, text in enumerate(texts))

    def _assemble(self, device: str) -> None:
        plan = self._plan
        bundle = {"CPU": plan.num_cpus, **({"GPU": plan.num_gpus} if plan.num_gpus else {})}
        # Inside a placement group (a Tune trial) the ranks take its bundles: a group of their own could wait for ever.
        group = ray.util.get_current_placement_group()
        if group is None:
            group = self._own = placement_group([bundle] * plan.ranks, strategy="PACK")
            if not group.wait(START_S):
                self._disband()
                raise PlacementError(
                    f"Ray did not place engine.zero.ranks={plan.ranks} processes of {bundle} within {START_S:g} s"
                )
        options: dict[str, Any] = {
            "num_cpus": plan.num_cpus,
            "num_gpus": plan.num_gpus,
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"watch": 1},
            "scheduling_strategy": PlacementGroupSchedulingStrategy(group),
        }
        self._ranks = [
            ray.remote(**options)(ZeroRank).remote(self._setup, index, plan.ranks) for index in range(plan.ranks)
        ]
        ((host, port),) = self._all([self._ranks[0].call_meeting.remote()])
        self._all([rank.join.remote(host, port, self._deadline_s, device) for rank in self._ranks])

    def _all(self, refs: list[Any]) -> list[Any]:
        """What all ranks answer; the end of the group if one does not."""
        waiting, limit = list(refs), None
        while waiting:
            left = None if limit is None else max(0.0, limit - time.monotonic())
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            if not ready:
                index = refs.index(waiting[0])
                self._fail(ActorLoss("hang", f"rank {index}: no answer {self._deadline_s:g} s after another rank's"))
            try:
                ray.get(ready[0])
            except Exception as error:
                self._lose(refs.index(ready[0]), error, waiting)
            # Ranks work in step: where one has ended, the others are about to.
            limit = limit or time.monotonic() + self._deadline_s
        return ray.get(refs)

    def _lose(self, index: int, error: Exception, others: list[Any]) -> NoReturn:
        """Ends the group with the error of a rank, or with the death of another that explains it."""
        cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
        if isinstance(cause, TailorError):
            self._disband()
            raise cause
        if isinstance(cause, ray.exceptions.RayActorError):
            self._fail(_loss(error))
        # Ranks that lose their peer say so first; that it died is heard later.
        ended = ray.wait(others, num_returns=len(others), timeout=CAUSE_S)[0] if others else []
        for ref in ended:
            try:
                ray.get(ref)
            except ray.exceptions.RayActorError as death:
                self._fail(_loss(death))
            except Exception:
                continue  # the first error stands
        text = str(cause).strip().split("\n")[0]
        self._fail(ActorLoss("death", f"rank {index}: {type(cause).__name__}: {text}", str(error)))

    def _fail(self, loss: ActorLoss) -> NoReturn:
        self._disband()
        raise GroupLostError(loss) from None

    def _disband(self) -> None:
        """Ends all ranks: those that are left wait for the lost one."""
        for rank in self._ranks:
            ray.kill(rank, no_restart=True)
        if self._own is not None:
            remove_placement_group(self._own)
        self._ranks, self._spec, self._own = [], None, None


def _loss(error: Exception) -> ActorLoss:
    loss_or_error = classify_error(error)
    return (
        loss_or_error if isinstance(loss_or_error, ActorLoss) else ActorLoss("death", str(loss_or_error).split("\n")[0])
    )
