"""Activation checkpointing that knows lanes: a block that is computed again sees what it saw the first time.

torch itself restores its default generators only. Adapter dropout draws from one generator per lane, and the batch's
shapes may be another's by the time of the backward pass. A second derivative computes a block more than once again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from types import TracebackType

from torch import Tensor

from fedtailor.lanes.layers import LaneState

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def replaying(state: LaneState) -> Callable[[], Contexts]:
    """For ``torch.utils.checkpoint``'s ``context_fn``: called once per block and forward pass.

    Args:
        state: of the model whose blocks are checkpointed.

    Returns:
        A function that gives the two contexts, of the forward pass and of its repetitions.
    """

    def contexts() -> Contexts:
        seen: list[tuple[LaneState, list[Tensor]]] = []
        return _record(state, seen), _Replay(state, seen)

    return contexts


@contextmanager
def _record(state: LaneState, seen: list[tuple[LaneState, list[Tensor]]]) -> Iterator[None]:
    seen.append((replace(state), _positions(state) if state.dropout else []))
    yield


@dataclass
class _Replay(AbstractContextManager[None]):
    """The state and the dropout streams of the forward pass; can be entered again, but not inside itself."""

    state: LaneState
    seen: list[tuple[LaneState, list[Tensor]]]
    now: LaneState = field(default_factory=LaneState)
    after: list[Tensor] = field(default_factory=list)

    def __enter__(self) -> None:
        then, positions = self.seen[0]
        self.now = replace(self.state)
        _put(self.state, then)
        self.after = _positions(self.state) if positions else []
        _set(self.state, positions)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _set(self.state, self.after)
        _put(self.state, self.now)


def _positions(state: LaneState) -> list[Tensor]:
    return [generator.get_state() for generator in state.generators]


def _set(state: LaneState, positions: list[Tensor]) -> None:
    for generator, position in zip(state.generators, positions, strict=bool(positions)):
        generator.set_state(position)


def _put(state: LaneState, values: LaneState) -> None:
    for one in fields(LaneState):
        setattr(state, one.name, getattr(values, one.name))
