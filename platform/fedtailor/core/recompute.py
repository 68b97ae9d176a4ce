"""Activation checkpointing that knows lanes: a block that is computed again sees what it saw the first time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields, replace

import torch

from fedtailor.adapters.lane_linear import LaneState

Contexts = tuple[AbstractContextManager[None], AbstractContextManager[None]]


def replaying(state: LaneState) -> Callable[[], Contexts]:
    """For ``torch.utils.checkpoint``'s ``context_fn``: called once per block and forward pass.

    torch itself restores its default generators only. Adapter dropout draws from one generator per lane, and the
    batch's shapes may be another's by the time of the backward pass.

    Args:
        state: of the model whose blocks are checkpointed.

    Returns:
        A function that gives the two contexts, of the forward pass and of its repetition.
    """

    def contexts() -> Contexts:
        seen: list[tuple[LaneState, list[torch.Tensor]]] = []
        return _record(state, seen), _replay(state, seen)

    return contexts


@contextmanager
def _record(state: LaneState, seen: list[tuple[LaneState, list[torch.Tensor]]]) -> Iterator[None]:
    seen.append((replace(state), _positions(state) if state.dropout else []))
    yield


@contextmanager
def _replay(state: LaneState, seen: list[tuple[LaneState, list[torch.Tensor]]]) -> Iterator[None]:
    then, positions = seen[0]
    now = replace(state)
    _put(state, then)
    after = _positions(state) if positions else []
    for generator, position in zip(state.generators, positions, strict=bool(positions)):
        generator.set_state(position)
    try:
        yield
    finally:
        for generator, position in zip(state.generators, after, strict=bool(positions)):
            generator.set_state(position)
        _put(state, now)


def _positions(state: LaneState) -> list[torch.Tensor]:
    return [generator.get_state() for generator in state.generators]


def _put(state: LaneState, values: LaneState) -> None:
    for field in fields(LaneState):
        setattr(state, field.name, getattr(values, field.name))
