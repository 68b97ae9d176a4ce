"""ZeRO stage 1: ranks that keep a part of Adam's state each make, together, the very step that one process makes."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from fedtailor.core.scope import ParamSpec, Ranks, Scope
from fedtailor.lanes.adam import AdamGroup, LaneAdam
from fedtailor.lanes.params import LaneParams

SPECS = [
    ParamSpec("a", (3, 5), Scope.EPHEMERAL),
    ParamSpec("b", (4,), Scope.SHARED),
    ParamSpec("c", (2, 3), Scope.EPHEMERAL),
]
LANES, LIMIT_S = 2, 20.0


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, index: int, barrier: Barrier, table: list[Tensor]) -> None:
        self.index, self.size, self._barrier, self._table = index, len(table), barrier, table

    def sum_(self, tensor: Tensor) -> None:
        self._table[self.index] = tensor.clone()
        self._barrier.wait(LIMIT_S)
        total = torch.stack(self._table).sum(0)
        self._barrier.wait(LIMIT_S)
        tensor.copy_(total)


def steps(ranks: Ranks | None, rate: float | Tensor) -> tuple[list[Tensor], list[Tensor], int]:
    """Three steps, the last of one lane only: values, directions, states and how many numbers the moments have."""
    params = LaneParams(SPECS, LANES)
    params.optimizer_ranks = ranks
    rng = torch.Generator().manual_seed(4)
    for spec in SPECS:
        params.set(spec.name, torch.randn(LANES, *spec.shape, generator=rng))
    adam = LaneAdam(params, [AdamGroup(("a", "c"), rate), AdamGroup(("b",), 1e-2)])
    for step in range(3):
        for spec in SPECS:
            grad = params[spec.name].grad
            assert grad is not None
            grad.copy_(torch.randn(LANES, *spec.shape, generator=rng))
        adam.step(LANES if step < 2 else 1)
    kept = sum(m.numel() for group in adam._moments for m, _ in group)
    first, second, counts = adam.state()
    again = LaneAdam(params, adam.groups)
    again.load(first, second, counts)
    ahead = [*adam.directions(0).values(), first, second, *again.state()]
    return [params[spec.name].detach().clone() for spec in SPECS], ahead, kept


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("each", [False, True], ids=["one rate", "a rate per matrix"])
def test_the_step_is_the_same_to_the_last_bit_and_each_rank_keeps_its_share(size: int, each: bool) -> None:
    rate: float | Tensor = torch.tensor([[1e-3, 2e-3], [3e-3, 4e-3]]) if each else 1e-3
    values, directions, whole = steps(None, rate)
    barrier, table = Barrier(size), [torch.zeros(0)] * size
    with ThreadPoolExecutor(size) as executor:
        futures = [executor.submit(steps, Threads(index, barrier, table), rate) for index in range(size)]
        results = [future.result(LIMIT_S) for future in futures]
    for found, ahead, kept in results:
        same(found, values)
        same(ahead, directions)
        assert kept <= -(-whole // size) + 2 * LANES
    assert sum(kept for _, _, kept in results) == whole
