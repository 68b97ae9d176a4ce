"""One process of a group that holds a model together."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.client_actor import ClientActor, Host, here, stacks
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageSpec
from fedtailor.core.pool import StageInfo


@dataclass(frozen=True)
class RankAnswer:
    """What a rank says after a call: hashes of its results, and on rank 0 the results themselves."""

    hashes: tuple[str, ...]
    results: list[SegmentResult] | None


class ZeroRank:
    """A client actor that is one of several; `actors.zero_group.ZeroGroup` calls all of them at once.

    Args:
        worker: ``module:Class`` whose constructor takes the ranks.
        threads: torch and BLAS threads.
        environment: variables to set unless they are set already.
        run: run id, for metrics.
        number: of the group in its pool.
        index: of this rank, from 0.
        size: ranks of the group.
    """

    def __init__(
        self,
        worker: str,
        threads: int,
        environment: Mapping[str, str],
        run: str,
        number: int,
        index: int,
        size: int,
    ) -> None:
        self._index, self._size = index, size
        self._actor = ClientActor(worker, threads, None, environment, run, number)
        self._listener: socket.socket | None = None

    def call_meeting(self) -> Any:
        """Rank 0: opens the port where the others come to; returns a `fedtailor.core.process_group.Meeting`."""
        from fedtailor.core.process_group import call_meeting

        meeting, self._listener = call_meeting(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]
        return meeting

    def join(self, meeting: Any, deadline_s: float, device: str) -> None:
        """Joins the group; returns when all have."""
        from fedtailor.core.process_group import join

        self._actor.ranks = join(meeting, self._index, self._size, deadline_s, device, self._listener)

    def open(self, spec: StageSpec) -> str:
        """See `ClientActor.open`."""
        return self._actor.open(spec)

    def info(self) -> StageInfo | None:
        """See `ClientActor.info`."""
        return self._actor.info()

    def run(self, jobs: Sequence[SegmentJob], shared: FloatArray | None) -> RankAnswer:
        """Plays segments, as all ranks do at the same time."""
        from fedtailor.core.group_answer import content_hash

        results = self._actor.run(jobs, shared)
        hashes = tuple(content_hash(result) for result in results)
        return RankAnswer(hashes, results if self._index == 0 else None)

    @ray.method(concurrency_group="watch")
    def host(self) -> Host:
        """Pid and node; answers while `run` runs."""
        return here()

    @ray.method(concurrency_group="watch")
    def stack(self) -> str:
        """What every thread does now."""
        return stacks()
