"""The Neumann series, the Hessian product and what becomes of them: closed forms and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import CLASSES, VOCAB, toy_lanes

from fedtailor.lanes.batches import LaneBatch, make_batch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.methods.fedl2p_hypergradient import (
    HypergradientConfig,
    cotangent,
    hessian_product,
    neumann,
    rate_derivative,
)

PSI = 0.2


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def curvature(size: int = 5) -> Tensor:
    root = drawn(size, size, seed=3)
    return root @ root.T / size + 0.5 * torch.eye(size, dtype=torch.float64)


def test_psi_times_a_long_series_is_the_inverse_hessian_times_g() -> None:
    h, g = curvature(), drawn(5)
    (v,) = neumann([g], lambda t: [h @ t[0]], 2000, PSI)
    torch.testing.assert_close(PSI * v, torch.linalg.solve(h, g), rtol=1e-8, atol=0)


@pytest.mark.parametrize("terms", [0, 1, 3])
def test_a_short_series_is_its_matrix_polynomial(terms: int) -> None:
    h, g = curvature(), drawn(5)
    (v,) = neumann([g], lambda t: [h @ t[0]], terms, PSI)
    step = torch.eye(5, dtype=torch.float64) - PSI * h
    torch.testing.assert_close(v, sum(torch.linalg.matrix_power(step, q) @ g for q in range(terms + 1)))


def test_a_hyperparameter_inside_the_training_loss_gets_its_implicit_gradient() -> None:
    """Logistic regression with an L2 penalty of log strength s, trained to convergence."""
    x, y = drawn(40, 3), (drawn(40, seed=1) > 0).double()
    x_val, y_val = drawn(30, 3, seed=2), (drawn(30, seed=5) > 0).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits

    def train_loss(w: Tensor, s: Tensor) -> Tensor:
        return loss(x @ w, y) + 0.5 * s.exp() * w.square().sum()

    def solution(s: Tensor) -> Tensor:
        w = torch.zeros(3, dtype=torch.float64)
        for _ in range(30):
            slope = torch.autograd.functional.jacobian(lambda w: train_loss(w, s), w)
            w = w - torch.linalg.solve(torch.autograd.functional.hessian(lambda w: train_loss(w, s), w), slope)
        return w

    s, eps = torch.tensor(-1.5, dtype=torch.float64, requires_grad=True), 1e-5
    w = solution(s.detach()).requires_grad_()
    gradient = torch.autograd.grad(loss(x_val @ w, y_val), [w])
    slope = torch.autograd.grad(train_loss(w, s), [w], create_graph=True)
    v = neumann(gradient, hessian_product(slope, [w]), 3000, PSI)
    (found,) = torch.autograd.grad(slope, [s], grad_outputs=[-PSI * t for t in v])
    ends = [loss(x_val @ solution(s.detach() + sign * eps), y_val) for sign in (1, -1)]
    assert float(found) == pytest.approx(float(ends[0] - ends[1]) / (2 * eps), rel=1e-5)


@pytest.mark.parametrize("terms", [0, 3])
def test_on_a_quadratic_the_lookahead_is_the_derivative_through_the_last_updates(terms: int) -> None:
    h, target, u, w0 = curvature(), drawn(5, seed=6), drawn(5, seed=7), drawn(5, seed=8)

    def validation_loss(w: Tensor) -> Tensor:
        return (w - target).square().sum()

    rate = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    w = w0
    for _ in range(terms + 1):
        w = w - PSI * (h @ w) - rate * u
    (exact,) = torch.autograd.grad(validation_loss(w), rate)
    v = neumann([2 * (w.detach() - target)], lambda t: [h @ t[0]], terms, PSI)
    found = rate_derivative([t.unsqueeze(0) for t in v], [u.unsqueeze(0)])
    assert float(found) == pytest.approx(float(exact), rel=1e-12)


class TwoLayers:
    """A two-layer classifier per lane over the mean of token vectors."""

    def __init__(self, lanes: int) -> None:
        self.table = drawn(VOCAB, 4, seed=9)
        self.params = [
            drawn(lanes, 5, 4, seed=10).requires_grad_(),
            drawn(lanes, CLASSES, 5, seed=11).requires_grad_(),
        ]

    def logits(self, batch: LaneBatch, params: list[Tensor] | None = None) -> Tensor:
        first, second = params or self.params
        mask = batch.attention_mask.unsqueeze(-1)
        x = (self.table[batch.input_ids] * mask).sum(2) / mask.sum(2)
        return torch.bmm(torch.bmm(x, first.transpose(1, 2)).tanh(), second.transpose(1, 2))


def setting(lanes: int = 3) -> tuple[TwoLayers, LaneBatch, LaneBatch]:
    examples = [lane.train for lane in toy_lanes([6] * lanes)]
    train, validation = (make_batch(examples, [np.array(rows)] * lanes, 0) for rows in ([0, 1], [4]))
    return TwoLayers(lanes), train, validation


def dense(net: TwoLayers, batch: LaneBatch, lane: int) -> tuple[Tensor, Tensor]:
    """Gradient and Hessian of one lane's loss, all parameters in one vector."""
    sizes, shapes = [p[0].numel() for p in net.params], [p[0].shape for p in net.params]

    def loss(flat: Tensor) -> Tensor:
        own = [part.view(1, *shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        all_lanes = [
            torch.cat([p[:lane].detach(), mine, p[lane + 1 :].detach()])
            for p, mine in zip(net.params, own, strict=True)
        ]
        return lane_cross_entropy(net.logits(batch, all_lanes), batch)[lane]

    point = torch.cat([p[lane].detach().flatten() for p in net.params])
    return torch.autograd.functional.jacobian(loss, point), torch.autograd.functional.hessian(loss, point)


CASES = {
    "lookahead": HypergradientConfig(psi=PSI),
    "one step": HypergradientConfig(psi=PSI, terms=0),
    "times psi": HypergradientConfig(psi=PSI, times_psi=True),
    "one step times psi": HypergradientConfig(psi=PSI, terms=0, times_psi=True),
    "shared losses": HypergradientConfig(psi=PSI, share_losses=True, pairs=4),
    "implicit": HypergradientConfig(psi=PSI, form="implicit"),
    "as the public code": HypergradientConfig(form="implicit", share_losses=True),
}


@pytest.mark.parametrize("cfg", CASES.values(), ids=CASES)
def test_every_lane_has_its_own_gradient_and_hessian(cfg: HypergradientConfig) -> None:
    net, train, validation = setting()
    found = cotangent(lambda batch: lane_cross_entropy(net.logits(batch), batch), net.params, train, validation, cfg)
    for lane in range(3):
        g, h = dense(net, validation, lane)[0], dense(net, train, lane)[1]
        h = h / cfg.pairs if cfg.share_losses else h
        step = torch.eye(len(g), dtype=torch.float64) - cfg.psi * h
        expected = sum(torch.linalg.matrix_power(step, q) @ g for q in range(cfg.terms + 1))
        expected = -h @ expected if cfg.form == "implicit" else expected
        expected = cfg.psi * expected if cfg.times_psi else expected
        mine = torch.cat([t[lane].flatten() for t in found])
        torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_the_public_codes_form_telescopes_and_points_the_other_way_where_the_loss_curves_upwards() -> None:
    h, g, psi = curvature(), drawn(5), 0.1
    assert float(torch.linalg.eigvalsh(psi * h).max()) < 1
    (v,) = neumann([g], lambda t: [h @ t[0]], 3, psi)
    identity = torch.eye(5, dtype=torch.float64)
    implicit = -h @ v
    torch.testing.assert_close(
        implicit, -(identity - torch.linalg.matrix_power(identity - psi * h, 4)) @ g / psi, rtol=1e-10, atol=0
    )
    values, vectors = torch.linalg.eigh(h)
    assert bool(((vectors.T @ implicit) * (vectors.T @ v) < 0).all()), values


def test_the_rates_derivative_is_minus_the_inner_product_of_each_tensor_and_lane() -> None:
    v, u = [drawn(2, 3, 4), drawn(2, 5)], [drawn(2, 3, 4, seed=1), drawn(2, 5, seed=2)]
    found = rate_derivative(v, u)
    assert found.shape == (2, 2)
    assert float(found[1, 0]) == pytest.approx(-math.fsum((v[0][1] * u[0][1]).flatten().tolist()))
    assert float(found[0, 1]) == pytest.approx(-math.fsum((v[1][0] * u[1][0]).flatten().tolist()))
