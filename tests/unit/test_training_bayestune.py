"""Eq. 1, 4 and 5 of FedP2EFT against float64 references written from the paper, and finite differences."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import toy_context, toy_lanes, toy_net, warnings_of

from fedtailor.adapters.bayestune_lora import LAMBDA, BayesTuneLora, column_norms, use_lambda
from fedtailor.adapters.lora import LoraAdapter, lora_names
from fedtailor.core.scope import Scope
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.methods import build_method
from fedtailor.training.bayestune import (
    LAMBDA_MAX,
    LAMBDA_MIN,
    RankSearchConfig,
    clamp_lambda,
    hyper_prior,
    search_ranks,
    sparsity,
)
from fedtailor.training.local import Training, train

RANK, LAYERS = 3, 14
QUICK = RankSearchConfig(lr=5e-3, lambda_lr=5e-2, batch_size=4, epochs=2)


def searching(sizes: list[int], dtype: torch.dtype = torch.float64):  # type: ignore[no-untyped-def]
    return toy_context(toy_net(dtype), toy_lanes(sizes), BayesTuneLora(RANK, 2.0), r_max=4)


def test_eq_4_sums_column_norms_over_lambda_over_layers_and_ranks() -> None:
    norms = torch.tensor([[[1.0, 2.0], [3.0, 0.0]]], dtype=torch.float64)
    lam = torch.tensor([[[0.5, 4.0], [1e-4, 2.0]]], dtype=torch.float64)
    assert float(sparsity(norms, lam)) == pytest.approx(1 / 0.5 + 2 / 4 + 3 / 1e-4, rel=1e-14)


def test_eq_5_sums_log_lambda_and_100_lambda() -> None:
    lam = torch.tensor([[[0.5, 2.0]], [[1e-4, 1.0]]], dtype=torch.float64)
    expected = [math.log(0.5) + 50 + math.log(2) + 200, math.log(1e-4) + 1e-2 + 0 + 100]
    np.testing.assert_allclose(hyper_prior(lam).numpy(), expected, rtol=1e-14)


def test_the_norm_of_eq_4_runs_over_columns_of_b_not_rows() -> None:
    ctx = searching([5])
    name = ctx.net.adapted[0].name
    b = torch.arange(16 * RANK, dtype=torch.float64).view(16, RANK) - 20
    ctx.params.set(f"lora_B.{name}", b)
    np.testing.assert_allclose(column_norms(ctx.net, ctx.params, 1)[0, 0].detach().numpy(), np.abs(b.numpy()).sum(0))


def test_the_clamp_stops_values_and_lets_gradients_through() -> None:
    raw = torch.tensor([-3.0, 0.5, 5e3], dtype=torch.float64, requires_grad=True)
    clamped = clamp_lambda(raw)
    assert clamped.tolist() == [LAMBDA_MIN, 0.5, LAMBDA_MAX]
    (clamped * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert raw.grad is not None
    assert raw.grad.tolist() == [1.0, 2.0, 3.0]


def objective(ctx, batch, alpha_s: float, alpha_p: float, n: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Eq. 1 written anew, layer by layer, for one lane."""
    lam = ctx.params[LAMBDA]
    use_lambda(ctx.net, lam)
    total = lane_cross_entropy(ctx.net.logits(batch), batch)[0]
    for number, adapted in enumerate(ctx.net.adapted):
        for rank in range(RANK):
            scale = lam[0, number, rank]
            column = ctx.params[f"lora_B.{adapted.name}"][0, :, rank]
            total = total + alpha_s / n * column.abs().sum() / scale
            total = total + alpha_p / n * (scale.log() + 100 * scale)
    return total


def test_gradient_of_eq_1_agrees_with_finite_differences_for_lambda_a_and_b() -> None:
    ctx = searching([6])
    rng = torch.Generator().manual_seed(5)
    ctx.params.set(LAMBDA, 0.2 + torch.rand(LAYERS, RANK, dtype=torch.float64, generator=rng))
    for adapted in ctx.net.adapted:
        shape = ctx.params[f"lora_B.{adapted.name}"].shape
        ctx.params.set(f"lora_B.{adapted.name}", torch.randn(shape, dtype=torch.float64, generator=rng) * 0.1)
    lane = ctx.lanes[0]
    batch = make_batch([lane.train], [np.arange(lane.size)], 0)
    loss = objective(ctx, batch, 100.0, 0.01, lane.size)
    loss.backward()
    module = ctx.net.adapted[3].name
    for name, index in [(LAMBDA, (0, 3, 1)), (f"lora_A.{module}", (0, 2, 4)), (f"lora_B.{module}", (0, 7, 0))]:
        analytic, step, values = float(ctx.params[name].grad[index]), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                ctx.params[name][index] += sign * step
                values.append(float(objective(ctx, batch, 100.0, 0.01, lane.size)))
                ctx.params[name][index] -= sign * step
        assert analytic == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_first_step_of_the_search_is_the_gradient_of_eq_1() -> None:
    ctx = searching([4])
    start = torch.full((1, LAYERS, RANK), 0.5, dtype=torch.float64)
    one_step = QUICK.model_copy(update={"batch_size": 4, "epochs": 1, "lambda_lr": 1e-3})
    lam, _ = search_ranks(ctx, start, one_step)
    # With B = 0 only the hyper-prior pulls lambda, downwards; Adam's first step is the learning rate.
    np.testing.assert_allclose(lam.numpy(), 0.5 - 1e-3, atol=1e-9)


@pytest.mark.parametrize("config", [QUICK, QUICK.model_copy(update={"max_grad_norm": 1.0})], ids=["plain", "clipped"])
def test_search_equals_a_plain_float64_loop_with_torch_adam(config: RankSearchConfig) -> None:
    ctx = searching([7])
    indices = ctx.training_order(config.epochs, config.batch_size, "train")[0]
    lam, _ = search_ranks(ctx, torch.full((1, LAYERS, RANK), 0.3, dtype=torch.float64), config)

    other = searching([7])
    other.params.set(LAMBDA, torch.full((LAYERS, RANK), 0.3, dtype=torch.float64))
    weights = [other.params[f"lora_{m}.{s.name}"] for s in other.net.adapted for m in "AB"]
    adam = torch.optim.Adam(
        [{"params": weights, "lr": config.lr}, {"params": [other.params[LAMBDA]], "lr": config.lambda_lr}]
    )
    lane = other.lanes[0]
    for index in indices:
        adam.zero_grad(set_to_none=False)
        objective(other, make_batch([lane.train], [index], 0), 100.0, 0.01, lane.size).backward()
        if config.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm)
        adam.step()
    torch.testing.assert_close(lam, other.params[LAMBDA].detach(), rtol=1e-9, atol=1e-12)


def test_switches_of_the_reference_change_what_they_name() -> None:
    def found(**switch: object) -> torch.Tensor:
        ctx = searching([9])
        config = RankSearchConfig.model_validate(QUICK.model_dump() | switch)
        return search_ranks(ctx, torch.full((1, LAYERS, RANK), 1e-4, dtype=torch.float64), config)[0]

    paper = found()
    assert float(paper.min()) >= LAMBDA_MIN
    assert not torch.equal(found(accumulate_lambda_grad=True), paper)
    assert not torch.equal(found(forward="raw"), paper)
    few = {"epochs": 1, "batch_size": 9}
    assert float(found(target="raw", **few).min()) < 0 < LAMBDA_MIN == float(found(**few).min())


def test_fewer_than_three_steps_warn_and_name_the_client() -> None:
    ctx = searching([8])
    search_ranks(
        ctx,
        torch.full((1, LAYERS, RANK), 1e-4, dtype=torch.float64),
        QUICK.model_copy(update={"batch_size": 8}),
    )
    [(client, text)] = warnings_of(ctx)
    assert client == ctx.lanes[0].client.id
    assert "2 step" in text


def test_penalties_are_divided_by_the_number_of_training_examples() -> None:
    ctx = searching([20, 5])
    doubled = replace(ctx)
    assert doubled.sizes.tolist() == [20.0, 5.0]


def test_with_lambda_frozen_at_one_and_no_penalty_the_search_is_lora_training() -> None:
    cfg = RankSearchConfig(lr=5e-3, lambda_lr=0.0, batch_size=4, epochs=2, alpha_s=0.0, alpha_p=0.0)
    lanes = toy_lanes([9, 5])
    searched = toy_context(toy_net(), lanes, BayesTuneLora(4, 2.0))
    lam, _ = search_ranks(searched, torch.ones(2, len(searched.net.adapted), 4, dtype=torch.float64), cfg)
    assert torch.equal(lam, torch.ones_like(lam))
    plain = toy_context(toy_net(), lanes, LoraAdapter(4, 2.0, Scope.EPHEMERAL))
    train(plain, [AdamGroup(lora_names(plain.net), 5e-3)], Training(2, 4, "train"))
    for name in lora_names(plain.net):
        assert torch.equal(searched.params[name], plain.params[name])


def test_bayestune_lora_without_penalties_and_with_lambda_frozen_at_one_is_lora() -> None:
    tuning = {"lr": 5e-3, "batch_size": 4, "epochs": 2}
    search = tuning | {"lambda_lr": 0.0, "alpha_s": 0.0, "alpha_p": 0.0}
    found = {}
    configs = {"bayestune_lora": {"search": search, "finetune": tuning, "lambda_init": 1.0}, "lora": tuning}
    for name, config in configs.items():
        ctx = toy_context(toy_net(), toy_lanes([9, 5]), budgets=(1, 3), r_max=4)
        made = build_method(name, config, 4).personaliser(ctx)
        batch = make_batch([lane.train for lane in made.lanes], [np.arange(5)] * 4, 0)
        found[name] = (made.ranks, made.logits(batch))
    assert torch.equal(found["bayestune_lora"][0], found["lora"][0])
    assert torch.equal(found["bayestune_lora"][1], found["lora"][1])
