"""`LaneAdam` is K separate `torch.optim.Adam`s; clipping is per lane."""

from __future__ import annotations

import pytest
import torch

from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.lanes import adam
from fedtailor.lanes.adam import AdamGroup, LaneAdam, LaneSgd
from fedtailor.lanes.params import LaneParams, clip_lanes

SPECS = [
    ParamSpec("a", (3, 2), Scope.SHARED),
    ParamSpec("b", (4,), Scope.EPHEMERAL),
    ParamSpec("c", (2, 2), Scope.SHARED),
]
STEPS = [7, 7, 5, 2]


@pytest.fixture(params=[adam.CHUNK, 3], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is updated in one piece, and in several."""
    monkeypatch.setattr(adam, "CHUNK", request.param)


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
        separate = torch.optim.Adam([{"params": [own["a"], own["c"]], "lr": 1e-2}, {"params": [own["b"]], "lr": 3e-1}])
        for step in range(steps):
            for name, grad in noisy_gradients(step, lane).items():
                own[name].grad = grad.clone()
            separate.step()
        for name, value in own.items():
            torch.testing.assert_close(params[name][lane], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_decayed_weights_equal_torchs(kind: type[torch.optim.Optimizer]) -> None:
    params = LaneParams(SPECS, 2, dtype=torch.float64)
    for spec in SPECS:
        params.set(spec.name, torch.linspace(-2, 3, 2 * spec.size, dtype=torch.float64).view(2, *spec.shape))
    own = {s.name: params[s.name][1].detach().clone().requires_grad_() for s in SPECS}
    groups = [AdamGroup(("a", "c"), 1e-2, weight_decay=0.3), AdamGroup(("b",), 3e-1)]
    lanes = LaneAdam(params, groups) if kind is torch.optim.AdamW else LaneSgd(params, groups)
    theirs = kind([
        {"params": [own["a"], own["c"]], "lr": 1e-2, "weight_decay": 0.3 if kind is torch.optim.AdamW else 0.0},
        {"params": [own["b"]], "lr": 3e-1, "weight_decay": 0.0},
    ], lr=1.0)  # fmt: skip
    for step in range(4):
        lanes.zero_grad()
        for name, grad in noisy_gradients(step, 1).items():
            params[name].grad[1] += grad
            own[name].grad = grad.clone()
        if kind is torch.optim.SGD:  # torch's SGD has no decoupled decay
            with torch.no_grad():
                for name in ("a", "c"):
                    own[name].mul_(1 - 1e-2 * 0.3)
        lanes.step(2)
        theirs.step()
    for name, value in own.items():
        torch.testing.assert_close(params[name][1], value, rtol=1e-12, atol=1e-14)


def test_a_rate_per_parameter_decays_at_that_rate() -> None:
    params = LaneParams(SPECS, 2, dtype=torch.float64)
    for spec in SPECS:
        params.set(spec.name, torch.ones(spec.shape, dtype=torch.float64))
    rates = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], dtype=torch.float64)
    LaneAdam(params, [AdamGroup(("a", "b", "c"), rates, weight_decay=0.5)]).step(2)
    for column, name in enumerate("abc"):
        expected = (1 - 0.5 * rates[:, column]).view(2, *[1] * (params[name].dim() - 1))
        torch.testing.assert_close(params[name].detach(), expected.expand_as(params[name]), rtol=1e-12, atol=0)


def test_an_optimizer_goes_on_from_a_state_that_was_kept() -> None:
    values = []
    for cut in (False, True):
        params = LaneParams(SPECS, 2, dtype=torch.float64)
        groups = [AdamGroup(("a", "c"), 1e-2, weight_decay=0.1), AdamGroup(("b",), 3e-1)]
        adam = LaneAdam(params, groups)
        for step in range(6):
            if cut and step == 3:
                state, adam = adam.state(), LaneAdam(params, groups)
                assert [part.shape for part in state] == [(2, 14), (2, 14), (2, 1)]
                adam.load(*state)
            adam.zero_grad()
            for lane in range(2 if step < 4 else 1):
                for name, grad in noisy_gradients(step, lane).items():
                    params[name].grad[lane] += grad
            adam.step(2 if step < 4 else 1)
        values.append(torch.cat([params[s.name].detach().flatten() for s in SPECS]))
    assert torch.equal(values[0], values[1])


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


RATES = torch.tensor(
    [[1e-2, 3e-1, 5e-3], [2e-2, 0.0, 1e-3], [7e-3, 1e-1, 0.0], [1e-3, 1e-3, 1e-3]], dtype=torch.float64
)


def start_of(specs: list[ParamSpec], lanes: int, dtype: torch.dtype = torch.float64) -> LaneParams:
    params = LaneParams(specs, lanes, dtype=dtype)
    for spec in specs:
        rng = torch.Generator().manual_seed(1)
        params.set(spec.name, torch.randn(lanes, *spec.shape, dtype=dtype, generator=rng))
    return params


def run(params: LaneParams, groups: list[AdamGroup], **more: bool) -> LaneAdam:
    adam = LaneAdam(params, groups, **more)
    for step in range(max(STEPS)):
        k = sum(s > step for s in STEPS)
        adam.zero_grad()
        for lane in range(k):
            for name, grad in noisy_gradients(step, lane).items():
                params[name].grad[lane] += grad.to(params[name].dtype)
        adam.step(k)
    return adam


def test_rates_per_lane_and_tensor_equal_separate_adams() -> None:
    params = start_of(SPECS, 4)
    start = {s.name: params[s.name].detach().clone() for s in SPECS}
    # Names in another order than in the buffers: a rate must follow its name.
    names = ("b", "c", "a")
    run(params, [AdamGroup(names, RATES)])
    for lane, steps in enumerate(STEPS):
        own = {name: start[name][lane].clone().requires_grad_() for name in names}
        rates = RATES[lane].tolist()
        separate = torch.optim.Adam([{"params": [own[n]], "lr": lr} for n, lr in zip(names, rates, strict=True)])
        for step in range(steps):
            for name, grad in noisy_gradients(step, lane).items():
                own[name].grad = grad.clone()
            separate.step()
        for name, value in own.items():
            torch.testing.assert_close(params[name][lane], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lr", [1e-4, 1.3e-3, 1e-2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_equal_rates_give_the_bits_of_the_float(dtype: torch.dtype, lr: float) -> None:
    names = ("a", "b", "c")
    by_float, by_tensor = start_of(SPECS, 4, dtype), start_of(SPECS, 4, dtype)
    run(by_float, [AdamGroup(names, lr)])
    run(by_tensor, [AdamGroup(names, torch.full((4, 3), lr, dtype=torch.float64))])
    for scope in (Scope.SHARED, Scope.EPHEMERAL):
        assert torch.equal(by_float.flat(scope), by_tensor.flat(scope))


def test_the_direction_is_the_last_step_divided_by_its_rate() -> None:
    params, names = start_of(SPECS, 4), ("c", "a", "b")
    stops = {}

    adam = LaneAdam(params, [AdamGroup(names, 0.5)])
    for step in range(max(STEPS)):
        k = sum(s > step for s in STEPS)
        adam.zero_grad()
        for lane in range(k):
            for name, grad in noisy_gradients(step, lane).items():
                params[name].grad[lane] += grad
        before = {n: params[n].detach().clone() for n in names}
        adam.step(k)
        stops |= {(n, lane): (before[n][lane] - params[n].detach()[lane]) / 0.5 for n in names for lane in range(k)}
    directions = adam.directions()
    for (name, lane), expected in stops.items():
        torch.testing.assert_close(directions[name][lane], expected, rtol=1e-9, atol=1e-12)


def test_a_constant_correction_treats_every_step_like_the_first() -> None:
    params = LaneParams(SPECS[:1], 1, dtype=torch.float64)
    adam = LaneAdam(params, [AdamGroup(("a",), 1.0)], constant_correction=True)
    m = v = w = 0.0
    for grad in (2.0, -1.0, 3.0):
        params["a"].grad.fill_(grad)
        adam.step(1)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        w -= (m / 0.1) / ((v / 0.001) ** 0.5 + 1e-8)
    torch.testing.assert_close(params["a"].detach(), torch.full((1, 3, 2), w, dtype=torch.float64))


def test_rates_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\), expected \(4, 3\)"):
        LaneAdam(LaneParams(SPECS, 4), [AdamGroup(("a", "b", "c"), torch.ones(2, 3))])
