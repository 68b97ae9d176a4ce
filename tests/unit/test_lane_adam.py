"""`LaneAdam` is K separate `torch.optim.Adam`s; clipping is per lane."""

from __future__ import annotations

import pytest
import torch

from fedtailor.core.lane_adam import AdamGroup, LaneAdam
from fedtailor.core.lanes import LaneParams, clip_lanes
from fedtailor.core.scope import ParamSpec, Scope

SPECS = [
    ParamSpec("a", (3, 2), Scope.SHARED),
    ParamSpec("b", (4,), Scope.EPHEMERAL),
    ParamSpec("c", (2, 2), Scope.SHARED),
]
STEPS = [7, 7, 5, 2]


def noisy_gradients(step: int, lane: int) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(100 * step + lane)
    # Mixed magnitudes and signs: a sign or epsilon error must show.
    return {s.name: torch.randn(s.shape, generator=rng, dtype=torch.float64) * 10.0 ** (lane - 2) for s in SPECS}


def test_lanes_that_stop_early_equal_separate_adams() -> None:
    params = LaneParams(SPECS, 4, dtype=torch.float64)
    for spec in SPECS:
        params.set(
            spec.name,
            torch.randn(4, *spec.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        )
    start = {s.name: params[s.name].detach().clone() for s in SPECS}
    lanes = LaneAdam(params, [AdamGroup(("a", "c"), 1e-2), AdamGroup(("b",), 3e-1)])
    for step in range(max(STEPS)):
        k = sum(s > step for s in STEPS)
        lanes.zero_grad()
        for lane in range(k):
            for name, grad in noisy_gradients(step, lane).items():
                params[name].grad[lane] += grad
        lanes.step(k)
    for lane, steps in enumerate(STEPS):
        own = {name: value[lane].clone().requires_grad_() for name, value in start.items()}
        adam = torch.optim.Adam([{"params": [own["a"], own["c"]], "lr": 1e-2}, {"params": [own["b"]], "lr": 3e-1}])
        for step in range(steps):
            for name, grad in noisy_gradients(step, lane).items():
                own[name].grad = grad.clone()
            adam.step()
        for name, value in own.items():
            torch.testing.assert_close(params[name][lane], value, rtol=1e-12, atol=1e-14)


def test_clipping_a_lane_is_torch_clipping_of_that_lane() -> None:
    params = LaneParams(SPECS, 3, dtype=torch.float64)
    for lane in range(3):
        for name, grad in noisy_gradients(0, lane).items():
            params[name].grad[lane] = grad
    before = [{s.name: params[s.name].grad[lane].clone() for s in SPECS} for lane in range(3)]
    norms = clip_lanes(params.slices([s.name for s in SPECS]), 0.5, lanes=2)
    for lane in range(3):
        leaves = [torch.zeros(s.shape, dtype=torch.float64, requires_grad=True) for s in SPECS]
        for leaf, spec in zip(leaves, SPECS, strict=True):
            leaf.grad = before[lane][spec.name].clone()
        if lane < 2:
            assert float(torch.nn.utils.clip_grad_norm_(leaves, 0.5)) == pytest.approx(float(norms[lane]), rel=1e-12)
        for leaf, spec in zip(leaves, SPECS, strict=True):
            torch.testing.assert_close(params[spec.name].grad[lane], leaf.grad, rtol=1e-12, atol=0)


def test_neighbours_become_one_slice_and_scopes_stay_apart() -> None:
    params = LaneParams(SPECS, 2)
    assert [s.value.shape for s in params.slices(["a", "b", "c"])] == [(2, 4), (2, 10)]
    params.flat(Scope.SHARED)[1] = torch.arange(10.0)
    assert params["c"][1].tolist() == [[6.0, 7.0], [8.0, 9.0]]


def test_an_accumulating_group_keeps_its_gradient() -> None:
    params = LaneParams(SPECS[:1], 1)
    adam = LaneAdam(params, [AdamGroup(("a",), 1.0, zero_grad=False)])
    params["a"].grad.fill_(2.0)
    adam.zero_grad()
    assert float(params["a"].grad.sum()) == 12.0


def test_bfloat16_weights_lose_small_steps() -> None:
    params = LaneParams(SPECS[:1], 1)
    params.set("a", torch.full((3, 2), 0.5))
    adam = LaneAdam(params, [AdamGroup(("a",), 5e-5, rounded=torch.bfloat16)])
    params["a"].grad.fill_(1.0)
    adam.step(1)
    assert float(params["a"].detach().min()) == 0.5


def test_frozen_and_repeated_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="FROZEN"):
        LaneParams([ParamSpec("w", (1,), Scope.FROZEN)], 1)
    with pytest.raises(ValueError, match="twice"):
        LaneParams([SPECS[0], SPECS[0]], 1)
