"""Keeps actors alive: starts them, opens stages on them, watches their deadlines, replaces the lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.client_actor import Host
from actors.ray_errors import Loss, judge
from fedtailor.core.errors import PlacementError, WorkerError
from fedtailor.core.messages import SegmentJob, SegmentResult, StageInfo, StageSpec
from fedtailor.federated.pool import OnEvent

START_S = 120.0
"""Seconds until an actor that Ray does not start is an event, or an error if the run cannot go on without."""

STACK_S = 3.0

_CHECK_S = 5.0


@dataclass(frozen=True)
class Call:
    """What an actor is busy with: ``start``, ``open`` or ``run`` (which round, which jobs of its list)."""

    kind: str
    deadline: float
    round: int = -1
    positions: tuple[int, ...] = ()


@dataclass(eq=False)
class Member:
    """One actor and its single outstanding call."""

    number: int
    actor: Any
    ref: Any = None
    call: Call | None = None
    host: Host | None = None
    fingerprint: str | None = None
    """Of the open stage; None until it is open."""
    losses: tuple[Loss, ...] = ()
    """Deaths in a row without having opened a stage."""

    @property
    def idle(self) -> bool:
        """Open and not busy."""
        return self.fingerprint is not None and self.call is None


@dataclass(frozen=True)
class Answer:
    """The end of a ``run`` call: results, or the loss of the actor."""

    member: Member
    call: Call
    results: list[SegmentResult] | None
    loss: Loss | None


class Crew:
    """A number of equal actors.

    Args:
        make_actor: creates the one of a number; must return at once.
        deadline_s: seconds for one call.
        retries: deaths in a row that an actor's place may suffer before a stage is open.
        on_event: hears of every loss, replacement and hang.
        all_needed: an actor that Ray does not start is an error even if others are up.
    """

    def __init__(
        self,
        make_actor: Callable[[int], Any],
        deadline_s: float,
        retries: int,
        on_event: OnEvent,
        all_needed: bool = False,
    ) -> None:
        self._make_actor, self._on_event = make_actor, on_event
        self._deadline_s, self._retries, self._all_needed = deadline_s, retries, all_needed
        self._spec: StageSpec | None = None
        self._fingerprint: str | None = None
        self.members: list[Member] = []

    def hire(self, count: int) -> None:
        """Grows to ``count`` actors; returns before they are up."""
        taken = {member.number for member in self.members}
        free = (number for number in range(count) if number not in taken)
        self.members += [self._start(number) for number in free]

    def open(self, spec: StageSpec) -> StageInfo:
        """Opens a stage everywhere; returns as soon as one actor has it, the others join when they can."""
        self._spec, self._fingerprint = spec, None
        for member in self.members:
            member.fingerprint, member.losses = None, ()
            if member.host is not None:
                self._open(member)
        while True:
            first = next((m for m in self.members if m.idle), None)
            if first is None:
                self.wait()
                continue
            try:
                info = ray.get(first.actor.info.remote(), timeout=self._deadline_s)
            except Exception as error:
                self._replace(first, self._loss(error))
                continue
            assert isinstance(info, StageInfo)
            return info

    def submit(self, member: Member, jobs: Sequence[SegmentJob], shared: Any, round: int, at: Sequence[int]) -> None:
        """Sends a call; ``shared`` is a reference to the round's array, or None."""
        call = Call("run", time.monotonic() + self._deadline_s, round, tuple(at))
        self._call(member, call, (list(jobs), shared))

    def wait(self) -> list[Answer]:
        """Blocks until a call ends or an actor becomes idle; may return nothing.

        Raises:
            WorkerError: a place was lost too often before it could open the stage.
            PlacementError: Ray starts no actor at all.
            TailorError: raised by a worker on purpose.
        """
        busy = [member for member in self.members if member.ref is not None]
        deadline = min(member.call.deadline for member in busy if member.call)
        refs = [member.ref for member in busy]
        ready, _ = ray.wait(refs, timeout=min(max(0.0, deadline - time.monotonic()), _CHECK_S))
        if ready:  # `wait` stops at the first; take all that are there, so that idle actors are fed together.
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        arrived = set(ready)
        ends = [self._finish(member) for member in busy if member.ref in arrived]
        ends += [self._expire(member) for member in busy if member.ref is not None]
        return [end for end in ends if end is not None]

    def lose_one(self, member: Member, loss: Loss, shrink: bool) -> None:
        """Replaces a lost actor; one that ran out of memory is rather done without, if others are left."""
        if shrink and loss.kind == "oom" and len(self.members) > 1:
            self._kill(member)
            self.members.remove(member)
            self._on_event({"event": "pool_shrunk", "actor": member.number, "actors": len(self.members)})
        else:
            self._replace(member, loss)

    def close(self) -> None:
        """Ends every actor."""
        for member in self.members:
            self._kill(member)
        self.members = []

    def _start(self, number: int, losses: tuple[Loss, ...] = ()) -> Member:
        member = Member(number, self._make_actor(number), losses=losses)
        self._call(member, Call("start", time.monotonic() + START_S))
        return member

    def _open(self, member: Member) -> None:
        self._call(member, Call("open", time.monotonic() + self._deadline_s), (self._spec,))

    def _call(self, member: Member, call: Call, arguments: tuple[Any, ...] = ()) -> None:
        method = {"start": "host"}.get(call.kind, call.kind)
        member.ref, member.call = getattr(member.actor, method).remote(*arguments), call

    def _finish(self, member: Member) -> Answer | None:
        """Reads a call's end."""
        call, ref = member.call, member.ref
        assert call is not None
        member.call = member.ref = None
        try:
            value = ray.get(ref)
        except Exception as error:
            return self._lost(member, call, self._loss(error))
        if call.kind == "run":
            return Answer(member, call, value, None)
        if call.kind == "start":
            member.host = value
            if self._spec is not None:
                self._open(member)
        else:
            self._opened(member, value)
        return None

    def _opened(self, member: Member, fingerprint: str) -> None:
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            raise WorkerError(
                f"actor {member.number}, {member.host}, opened the stage with another "
                "initial state than the others: do all nodes see the same model and data folders?"
            )
        member.fingerprint, member.losses = fingerprint, ()

    def _loss(self, error: Exception) -> Loss:
        verdict = judge(error)
        if isinstance(verdict, Loss):
            return verdict
        raise verdict from None

    def _expire(self, member: Member) -> Answer | None:
        """Deals with a call whose deadline has passed."""
        call = member.call
        if call is None or time.monotonic() < call.deadline:
            return None
        if call.kind == "start":
            self._still_waiting(member)
            return None
        member.call = member.ref = None
        loss = Loss("hang", f"no answer within engine.deadline_s={self._deadline_s:g}", self._stack(member))
        return self._lost(member, call, loss)

    def _lost(self, member: Member, call: Call, loss: Loss) -> Answer | None:
        self._on_event(
            {
                "event": "actor_lost", "actor": member.number, "kind": loss.kind, "cause": loss.cause,
                "host": str(member.host or "not started"), "node": member.host.node if member.host else "",
                "during": call.kind, "stack": loss.stack,
            }
        )  # fmt: skip
        if call.kind == "run":
            return Answer(member, call, None, loss)
        self._replace(member, loss)
        return None

    def _replace(self, member: Member, loss: Loss) -> None:
        losses = member.losses if member.fingerprint is not None else (*member.losses, loss)
        if len(losses) > self._retries:
            stage = self._spec.key if self._spec else "any stage"
            causes = "; ".join(f"{item.kind}: {item.cause}" for item in losses)
            raise WorkerError(f"an actor died {len(losses)} times before it could open {stage}: {causes}")
        self._kill(member)
        self.members[self.members.index(member)] = self._start(member.number, losses)
        self._on_event({"event": "actor_replaced", "actor": member.number, "kind": loss.kind})

    def _still_waiting(self, member: Member) -> None:
        everything = ray.available_resources()  # type: ignore[no-untyped-call]
        free = {name: everything.get(name, 0.0) for name in ("CPU", "GPU")}
        missing = sum(other.host is None for other in self.members)
        if self._all_needed or missing == len(self.members):
            raise PlacementError(
                f"Ray did not start {missing} of {len(self.members)} actors within {START_S:g} s; "
                f"free on the cluster now: {free}"
            )
        self._on_event({"event": "actor_waiting", "actor": member.number, "free": free})
        member.call = Call("start", math.inf)

    def _stack(self, member: Member) -> str:
        try:
            return str(ray.get(member.actor.stack.remote(), timeout=STACK_S))
        except ray.exceptions.RayError as error:
            # A stopped process, or one that holds the interpreter's lock, cannot answer.
            return f"no stack: {type(error).__name__}"

    def _kill(self, member: Member) -> None:
        ray.kill(member.actor, no_restart=True)
