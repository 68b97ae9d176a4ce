"""Keeps actors alive: starts them, opens stages on them, watches their deadlines, replaces the lost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors.client_actor import Host
from actors.ray_errors import ActorLoss, classify_error
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
class ActorSlot:
    """One actor and its single outstanding call."""

    number: int
    actor: Any
    ref: Any = None
    call: Call | None = None
    host: Host | None = None
    fingerprint: str | None = None
    """Fingerprint of the open stage; None until it is open."""
    losses: tuple[ActorLoss, ...] = ()
    """Deaths in a row without having opened a stage."""

    @property
    def idle(self) -> bool:
        """Open and not busy."""
        return self.fingerprint is not None and self.call is None


@dataclass(frozen=True)
class Answer:
    """The end of a ``run`` call: results, or the loss of the actor."""

    slot: ActorSlot
    call: Call
    results: list[SegmentResult] | None
    loss: ActorLoss | None


class ActorSupervisor:
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
        self.slots: list[ActorSlot] = []

    def grow(self, count: int) -> None:
        """Grows to ``count`` actors; returns before they are up."""
        taken = {slot.number for slot in self.slots}
        free = (number for number in range(count) if number not in taken)
        self.slots += [self._start(number) for number in free]

    def open(self, spec: StageSpec) -> StageInfo:
        """Opens a stage everywhere; returns as soon as one actor has it, the others join when they can."""
        self._spec, self._fingerprint = spec, None
        for slot in self.slots:
            slot.fingerprint, slot.losses = None, ()
            if slot.host is not None:
                self._open(slot)
        while True:
            first = next((slot for slot in self.slots if slot.idle), None)
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

    def submit(self, slot: ActorSlot, jobs: Sequence[SegmentJob], shared: Any, round: int, at: Sequence[int]) -> None:
        """Sends a call; ``shared`` is a reference to the round's array, or None."""
        call = Call("run", time.monotonic() + self._deadline_s, round, tuple(at))
        self._call(slot, call, (list(jobs), shared))

    def wait(self) -> list[Answer]:
        """Blocks until a call ends or an actor becomes idle; may return nothing.

        Raises:
            WorkerError: a place was lost too often before it could open the stage.
            PlacementError: Ray starts no actor at all.
            TailorError: raised by a worker on purpose.
        """
        busy = [slot for slot in self.slots if slot.ref is not None]
        deadline = min(slot.call.deadline for slot in busy if slot.call)
        refs = [slot.ref for slot in busy]
        ready, _ = ray.wait(refs, timeout=min(max(0.0, deadline - time.monotonic()), _CHECK_S))
        if ready:  # `wait` stops at the first; take all that are there, so that idle actors are fed together.
            ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        arrived = set(ready)
        ends = [self._finish(slot) for slot in busy if slot.ref in arrived]
        ends += [self._expire(slot) for slot in busy if slot.ref is not None]
        return [end for end in ends if end is not None]

    def handle_loss(self, slot: ActorSlot, loss: ActorLoss, shrink: bool) -> None:
        """Replaces a lost actor; one that ran out of memory is rather done without, if others are left."""
        if shrink and loss.kind == "oom" and len(self.slots) > 1:
            self._kill(slot)
            self.slots.remove(slot)
            self._on_event({"event": "pool_shrunk", "actor": slot.number, "actors": len(self.slots)})
        else:
            self._replace(slot, loss)

    def close(self) -> None:
        """Ends every actor."""
        for slot in self.slots:
            self._kill(slot)
        self.slots = []

    def _start(self, number: int, losses: tuple[ActorLoss, ...] = ()) -> ActorSlot:
        slot = ActorSlot(number, self._make_actor(number), losses=losses)
        self._call(slot, Call("start", time.monotonic() + START_S))
        return slot

    def _open(self, slot: ActorSlot) -> None:
        self._call(slot, Call("open", time.monotonic() + self._deadline_s), (self._spec,))

    def _call(self, slot: ActorSlot, call: Call, arguments: tuple[Any, ...] = ()) -> None:
        method = {"start": "host"}.get(call.kind, call.kind)
        slot.ref, slot.call = getattr(slot.actor, method).remote(*arguments), call

    def _finish(self, slot: ActorSlot) -> Answer | None:
        """Reads a call's end."""
        call, ref = slot.call, slot.ref
        assert call is not None
        slot.call = slot.ref = None
        try:
            value = ray.get(ref)
        except Exception as error:
            return self._lost(slot, call, self._loss(error))
        if call.kind == "run":
            return Answer(slot, call, value, None)
        if call.kind == "start":
            slot.host = value
            if self._spec is not None:
                self._open(slot)
        else:
            self._opened(slot, value)
        return None

    def _opened(self, slot: ActorSlot, fingerprint: str) -> None:
        if self._fingerprint is None:
            self._fingerprint = fingerprint
        elif fingerprint != self._fingerprint:
            raise WorkerError(
                f"actor {slot.number}, {slot.host}, opened the stage with another "
                "initial state than the others: do all nodes see the same model and data folders?"
            )
        slot.fingerprint, slot.losses = fingerprint, ()

    def _loss(self, error: Exception) -> ActorLoss:
        loss_or_error = classify_error(error)
        if isinstance(loss_or_error, ActorLoss):
            return loss_or_error
        raise loss_or_error from None

    def _expire(self, slot: ActorSlot) -> Answer | None:
        """Deals with a call whose deadline has passed."""
        call = slot.call
        if call is None or time.monotonic() < call.deadline:
            return None
        if call.kind == "start":
            self._still_waiting(slot)
            return None
        slot.call = slot.ref = None
        loss = ActorLoss("hang", f"no answer within engine.deadline_s={self._deadline_s:g}", self._stack(slot))
        return self._lost(slot, call, loss)

    def _lost(self, slot: ActorSlot, call: Call, loss: ActorLoss) -> Answer | None:
        self._on_event(
            {
                "event": "actor_lost", "actor": slot.number, "kind": loss.kind, "cause": loss.cause,
                "host": str(slot.host or "not started"), "node": slot.host.node if slot.host else "",
                "during": call.kind, "stack": loss.stack,
            }
        )  # fmt: skip
        if call.kind == "run":
            return Answer(slot, call, None, loss)
        self._replace(slot, loss)
        return None

    def _replace(self, slot: ActorSlot, loss: ActorLoss) -> None:
        losses = slot.losses if slot.fingerprint is not None else (*slot.losses, loss)
        if len(losses) > self._retries:
            stage = self._spec.key if self._spec else "any stage"
            causes = "; ".join(f"{item.kind}: {item.cause}" for item in losses)
            raise WorkerError(f"an actor died {len(losses)} times before it could open {stage}: {causes}")
        self._kill(slot)
        self.slots[self.slots.index(slot)] = self._start(slot.number, losses)
        self._on_event({"event": "actor_replaced", "actor": slot.number, "kind": loss.kind})

    def _still_waiting(self, slot: ActorSlot) -> None:
        everything = ray.available_resources()  # type: ignore[no-untyped-call]
        free = {name: everything.get(name, 0.0) for name in ("CPU", "GPU")}
        missing = sum(other.host is None for other in self.slots)
        if self._all_needed or missing == len(self.slots):
            raise PlacementError(
                f"Ray did not start {missing} of {len(self.slots)} actors within {START_S:g} s; "
                f"free on the cluster now: {free}"
            )
        self._on_event({"event": "actor_waiting", "actor": slot.number, "free": free})
        slot.call = Call("start", math.inf)

    def _stack(self, slot: ActorSlot) -> str:
        try:
            return str(ray.get(slot.actor.stack.remote(), timeout=STACK_S))
        except ray.exceptions.RayError as error:
            # A stopped process, or one that holds the interpreter's lock, cannot answer.
            return f"no stack: {type(error).__name__}"

    def _kill(self, slot: ActorSlot) -> None:
        ray.kill(slot.actor, no_restart=True)
