"""FedL2P: rates are learned by the exact derivative of the validation loss; constant rates are plain LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy import toy_context, toy_examples, toy_lanes, toy_net, warnings_of

from fedtailor.adapters.lora import lora_names
from fedtailor.core.scope import Scope
from fedtailor.evaluation.classification import evaluate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_cross_entropy
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.methods.fedl2p import FedL2PConfig
from fedtailor.methods.fedl2p_hypergradient import HypergradientConfig, OuterPairs, cycled, rate_derivative
from fedtailor.methods.fedl2p_inner_loop import InnerLoop, fine_tune, held_out, split, split_lanes
from fedtailor.methods.fedl2p_net import MULTIPLIERS, LrNetConfig, RateNet
from fedtailor.tasks.task import task_config
from fedtailor.training.local import Training, train

TUNE = {"lr": 2e-2, "batch_size": 4, "epochs": 2}
FREE = {"lr": 1e-3, "multiplier_lr": 1e-3, "hidden": 8, "clip_at": 1e9}
"""Nothing is clipped: after a call, phi's ``.grad`` is the last step's hypergradient."""


def build(rank: int = 2, **config: Any) -> Method:
    sections = {"finetune": TUNE, "lrnet": FREE, "hypergradient": {"pairs": 4}} | config
    return build_method("fedl2p", sections, rank)


def context(method: Method, sizes: Sequence[int], net: LaneNet | None = None, **more: Any) -> ClientContext:
    net = net or toy_net()
    lanes = more.pop("lanes", None) or toy_lanes(sizes)
    return toy_context(net, lanes, method.adapter, method.modules, r_max=method.adapter.rank, **more)


def set_lora(ctx: ClientContext, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        ctx.params.set(name, value)


def after_one_inner_loop(ctx: ClientContext, method: Method) -> tuple[OuterPairs, dict[str, Tensor], list[Tensor]]:
    """The pairs, weights and last direction of the first outer step of ``method.local_update``."""
    update, cfg = method.local_update, method.local_update.cfg
    own, validation = split_lanes(ctx, cfg.validation)
    features = torch.stack(list(ctx.feature_source(ctx.lanes, None))).to(ctx.sizes)
    rates = update.net(ctx.params, features)[0].detach()
    loop = InnerLoop(cfg.finetune.epochs, cfg.finetune.batch_size, "train/0")
    direction = fine_tune(own, rates, loop).direction
    names = lora_names(ctx.net)
    weights = {name: ctx.params[name].detach().clone() for name in names}
    return OuterPairs.draw(own, validation, cfg.outer_steps, cfg.hypergradient.pairs), weights, direction


def pair_losses(ctx: ClientContext, pairs: OuterPairs) -> Tensor:
    """Mean validation loss over the first step's pairs, (K,)."""
    batch = make_batch(pairs.validation, list(pairs.validation_rows[:, 0]), 0)
    return lane_cross_entropy(ctx.net.logits(batch), batch)


PROBED = {
    "lrnet.first.weight": [(0, 3), (5, 11)],
    "lrnet.first.bias": [(2,)],
    "lrnet.second.weight": [(1, 7)],
    "lrnet.out.weight": [(4, 2), (27, 6)],
    "lrnet.out.bias": [(9,)],
    MULTIPLIERS: [(0,), (13,), (26,), (27,)],
}


def test_one_step_ahead_the_hypergradient_is_the_finite_difference_of_the_validation_loss() -> None:
    method = build(outer_steps=1, hypergradient={"pairs": 4, "terms": 0})
    measured = context(method, [11, 7])
    method.local_update(measured)
    ctx = context(method, [11, 7])
    pairs, weights, direction = after_one_inner_loop(ctx, method)
    features = torch.stack(list(ctx.feature_source(ctx.lanes, None))).to(ctx.sizes)
    net, names = method.local_update.net, lora_names(ctx.net)

    @torch.no_grad()
    def loss_at(name: str, where: tuple[int, ...], value: float) -> Tensor:
        before = net(ctx.params, features)[0]
        old = ctx.params[name].detach().clone()
        ctx.params[name].detach()[(slice(None), *where)] += value
        moved = net(ctx.params, features)[0] - before
        ctx.params.set(name, old)
        last = {n: weights[n] - moved[:, j].view(-1, 1, 1) * direction[j] for j, n in enumerate(names)}
        set_lora(ctx, last)
        return pair_losses(ctx, pairs)

    for name, places in PROBED.items():
        eps = 1e-5 if name == MULTIPLIERS else 1e-3
        for where in places:
            slope = (loss_at(name, where, eps) - loss_at(name, where, -eps)) / (2 * eps)
            found = measured.params[name].grad[(slice(None), *where)]
            assert bool((found.abs() > 1e-7).all()), f"{name}{where} says nothing"
            torch.testing.assert_close(found, slope, rtol=1e-3, atol=1e-9)


def test_with_more_terms_earlier_updates_count_as_the_hessian_lets_them_survive() -> None:
    cfg = {"pairs": 3, "terms": 2, "psi": 0.3}
    method = build(outer_steps=1, hypergradient=cfg)
    measured = context(method, [9])
    method.local_update(measured)
    ctx = context(method, [9])
    pairs, weights, direction = after_one_inner_loop(ctx, method)
    names, own, eps = lora_names(ctx.net), pairs.ctx, 1e-5

    def gradient(examples: Any, row: int, at: dict[str, Tensor]) -> list[Tensor]:
        set_lora(ctx, at)
        batch = make_batch([examples], [np.array([row])], 0)
        loss = lane_cross_entropy(ctx.net.logits(batch), batch).sum()
        return list(torch.autograd.grad(loss, [ctx.params[name] for name in names]))

    def moved(by: list[Tensor], factor: float) -> dict[str, Tensor]:
        return {name: weights[name] + factor * t for name, t in zip(names, by, strict=True)}

    total = [torch.zeros_like(w) for w in weights.values()]
    for t, v in zip(pairs.train_rows[0, 0], pairs.validation_rows[0, 0], strict=True):
        term = gradient(pairs.validation[0], v, weights)
        total = [a + b for a, b in zip(total, term, strict=True)]
        for _ in range(cfg["terms"]):
            ends = [gradient(own.lanes[0].train, t, moved(term, sign * eps)) for sign in (1, -1)]
            curved = [(a - b) / (2 * eps) for a, b in zip(*ends, strict=True)]
            term = [a - cfg["psi"] * c for a, c in zip(term, curved, strict=True)]
            total = [a + b for a, b in zip(total, term, strict=True)]
    features = torch.stack(list(ctx.feature_source(ctx.lanes, None))).to(ctx.sizes)
    raw = method.local_update.net(ctx.params, features)[1]
    expected = rate_derivative([a / cfg["pairs"] for a in total], direction) * raw.detach()
    torch.testing.assert_close(measured.params[MULTIPLIERS].grad, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", ["lookahead", "implicit"])
def test_pairs_at_once_change_nothing(form: str) -> None:
    shared = []
    for at_once in (1, 3, 8):
        method = build(hypergradient={"pairs": 4, "at_once": at_once, "form": form})
        ctx = context(method, [8, 5])
        method.local_update(ctx)
        shared.append(ctx.params.flat(Scope.SHARED).clone())
    torch.testing.assert_close(shared[0], shared[1], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(shared[0], shared[2], rtol=1e-9, atol=1e-12)


def test_k_lanes_are_k_rounds_of_one() -> None:
    method, lanes = build(), toy_lanes([13, 9, 6, 2])
    together = context(method, [], lanes=lanes)
    report = method.local_update(together)
    for k, lane in enumerate(lanes):
        alone = context(method, [], lanes=[lane])
        own = method.local_update(alone)
        for scope in (Scope.SHARED, Scope.EPHEMERAL):
            torch.testing.assert_close(
                together.params.flat(scope)[k], alone.params.flat(scope)[0], rtol=1e-9, atol=1e-11
            )
        for metric, values in report.metrics.items():
            torch.testing.assert_close(values[k], own.metrics[metric][0], rtol=1e-7, atol=1e-10)


def test_two_runs_are_the_same_bytes() -> None:
    rows = []
    for _ in range(2):
        method = build()
        ctx = context(method, [8, 5], toy_net(torch.float32))
        method.local_update(ctx)
        rows.append(ctx.params.flat(Scope.SHARED).clone())
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][0], rows[0][1])


def say_one(ctx: ClientContext) -> None:
    """LRNet's answer becomes exactly 1 for everyone."""
    ctx.params.set("lrnet.out.weight", torch.zeros_like(ctx.params["lrnet.out.weight"]))
    ctx.params.set("lrnet.out.bias", torch.ones_like(ctx.params["lrnet.out.bias"]))


@pytest.mark.parametrize(("dtype", "lr"), [(torch.float64, 1e-2), (torch.float32, 2.0**-7)], ids=["float64", "float32"])
def test_constant_rates_are_lora_bit_for_bit(dtype: torch.dtype, lr: float) -> None:
    lanes, tune = toy_lanes([9, 6]), TUNE | {"lr": lr, "dropout": 0.2}
    tests = [toy_examples("probe", 5)] * 4
    batch = make_batch(tests, [np.arange(5)] * 4, 0)
    answers = []
    for name, config in (("lora", tune), ("fedl2p", {"finetune": tune})):
        method, net = build_method(name, config, 4), toy_net(dtype)
        ctx = toy_context(net, lanes, None, method.modules, r_max=4, budgets=(1, 4))
        if name == "fedl2p":
            say_one(ctx)
        answers.append(method.personaliser(replace(ctx, stage="personalise")).logits(batch).detach())
    assert torch.equal(answers[0], answers[1])


def test_the_inner_loop_at_constant_rates_is_local_training_bit_for_bit() -> None:
    method, weights = build(), []
    for constant in (True, False):
        ctx = context(method, [9, 6])
        names = lora_names(ctx.net)
        if constant:
            fine_tune(ctx, torch.full((2, len(names)), 1e-2, dtype=torch.float64), InnerLoop(2, 4, "x", 0.1, 0.2))
        else:
            train(ctx, [AdamGroup(names, 1e-2)], Training(2, 4, "x", 0.1, dropout=0.2))
        weights.append(ctx.params.flat(Scope.EPHEMERAL).clone())
    assert torch.equal(weights[0], weights[1])


def test_rates_start_near_the_fine_tuning_rate_and_every_matrix_has_its_own() -> None:
    method = build(lrnet={}, finetune=TUNE | {"lr": 1e-4})
    ctx = context(method, [6, 4])
    features = torch.stack(list(ctx.feature_source(ctx.lanes, None))).to(ctx.sizes)
    rates, _ = method.local_update.net(ctx.params, features)
    assert rates.shape == (2, 28)
    assert bool((rates > 0).all())
    assert float(rates.detach().mean()) == pytest.approx(1e-4, rel=0.3)
    assert len(set(rates[0].tolist())) == 28
    assert ctx.params["lrnet.second.weight"].shape == (2, 100, 100)


def test_one_lane_is_a_torch_mlp() -> None:
    net, rate_net = toy_net(), RateNet(LrNetConfig(gain=1.0, bias=0.1, hidden=7), 0.5)
    ctx = toy_context(net, toy_lanes([5]), None, [rate_net])
    mlp = torch.nn.Sequential(
        torch.nn.Linear(28, 7), torch.nn.ReLU(), torch.nn.Linear(7, 7), torch.nn.ReLU(), torch.nn.Linear(7, 28)
    ).double()
    with torch.no_grad():
        for parameter, spec in zip(mlp.parameters(), rate_net.specs(net), strict=False):
            parameter.copy_(ctx.params[spec.name][0])
    features = torch.randn(1, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * mlp(features)[0].clamp(0, 1000)
    torch.testing.assert_close(rate_net(ctx.params, features)[0][0], expected, rtol=1e-12, atol=0)


def test_outputs_are_clamped_but_still_learn() -> None:
    method = build(outer_steps=1)
    ctx = context(method, [6])
    say_one(ctx)
    bias = torch.ones(28, dtype=torch.float64)
    bias[0], bias[1] = -5.0, 2e3
    ctx.params.set("lrnet.out.bias", bias)
    multipliers = torch.full((28,), 1e-3, dtype=torch.float64)
    multipliers[1], multipliers[2] = 1e-5, -1e-3
    ctx.params.set(MULTIPLIERS, multipliers)
    features = torch.stack(list(ctx.feature_source(ctx.lanes, None))).to(ctx.sizes)
    rates, _ = method.local_update.net(ctx.params, features)
    assert rates[0, :4].tolist() == pytest.approx([0.0, 1e-2, 0.0, 1e-3])
    frozen = ctx.params[lora_names(ctx.net)[0]].detach().clone()
    report = method.local_update(ctx)
    assert torch.equal(ctx.params[lora_names(ctx.net)[0]].detach(), frozen)
    assert float(report.metrics["rate_clamped_share"]) == pytest.approx(2 / 28)
    assert float(report.metrics["rate_zero_share"]) == pytest.approx(2 / 28)
    assert float(ctx.params["lrnet.out.bias"].grad[0, 0].abs()) > 0
    assert float(ctx.params[MULTIPLIERS].grad[0, 2].abs()) > 0


def test_the_hypergradient_is_clamped_element_by_element_or_to_two_norms() -> None:
    for clip in ("value", "norm"):
        method = build(outer_steps=1, lrnet=FREE | {"clip": clip, "clip_at": 1e-4})
        ctx = context(method, [8, 5])
        report = method.local_update(ctx)
        found = [ctx.params[name].grad for name in ("lrnet.out.weight", MULTIPLIERS)]
        assert bool((report.metrics["hypergradient_clipped_share"] > 0).all())
        if clip == "value":
            assert float(found[1].abs().max()) == pytest.approx(1e-4)
            assert bool(((found[1].abs() - 1e-4).abs() < 1e-12).sum(1).gt(1).all())
        else:
            torch.testing.assert_close(
                found[1].norm(dim=1), torch.full((2,), 1e-4, dtype=torch.float64), rtol=1e-2, atol=0
            )


def test_the_validation_split_covers_all_texts_and_depends_on_the_client_alone() -> None:
    for lane in toy_lanes([2, 3, 7, 20]):
        kept, held = split(lane, 3, 0.2)
        assert (len(held.labels), kept.size) == (held_out(lane.size, 0.2), lane.size - held_out(lane.size, 0.2))
        texts = sorted(map(tuple, [*kept.train.input_ids, *held.input_ids]))
        assert texts == sorted(map(tuple, lane.train.input_ids))
        again, other = split(lane, 3, 0.2)[1], split(lane, 4, 0.2)[1]
        assert np.array_equal(again.input_ids, held.input_ids)
        assert lane.size < 20 or not np.array_equal(other.input_ids, held.input_ids)


def test_a_larger_client_never_keeps_fewer_training_texts() -> None:
    for share in (0.2, 0.5, 0.9):
        kept = [size - held_out(size, share) for size in range(2, 200)]
        assert kept == sorted(kept)
        assert min(kept) >= 1


def test_no_text_is_drawn_again_before_all_were() -> None:
    rows = cycled(5, 13, np.random.default_rng(0))
    assert len(rows) == 13
    assert sorted(rows[:5]) == sorted(rows[5:10]) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("size", [1, 2])
def test_a_client_with_almost_no_texts_takes_part_and_is_reported(size: int) -> None:
    method = build()
    ctx = context(method, [6, size])
    before = ctx.params.flat(Scope.SHARED).clone()
    report = method.local_update(ctx)
    row = ctx.params.flat(Scope.SHARED)[1]
    assert bool(torch.isfinite(row).all())
    assert not torch.equal(row, before[1])
    assert all(bool(torch.isfinite(values).all()) for values in report.metrics.values())
    assert [client for client, _ in warnings_of(ctx)] == [ctx.lanes[1].client.id]


@pytest.mark.parametrize("terms", [0, 3])
def test_rates_that_are_far_too_small_grow_where_validation_agrees_with_training(terms: int) -> None:
    """A client with one text validates on it: a longer last step can only help."""
    method = build(
        outer_steps=4,
        finetune=TUNE | {"lr": 1e-4},
        lrnet=FREE | {"lr": 1e-8, "multiplier_lr": 1e-5},
        hypergradient={"pairs": 2, "terms": terms},
    )
    ctx = context(method, [1])
    before = ctx.params[MULTIPLIERS].detach().clone()
    method.local_update(ctx)
    assert float((ctx.params[MULTIPLIERS].detach() > before).double().mean()) > 0.9


def test_early_stopping_sees_the_loss_of_the_parameters_received() -> None:
    reports = []
    for steps in (1, 3):
        method = build(outer_steps=steps)
        reports.append(method.local_update(context(method, [9, 5])).metrics)
    assert torch.equal(reports[0]["val_loss"], reports[1]["val_loss"])
    ctx = context(method, [9, 5])
    pairs, weights, _ = after_one_inner_loop(ctx, method)
    set_lora(ctx, weights)
    scores = evaluate(ctx.net.logits, pairs.validation, 0, 10_000)
    expected = torch.tensor([s.loss_sum / s.count for s in scores], dtype=torch.float64)
    torch.testing.assert_close(reports[0]["val_loss"], expected, rtol=1e-9, atol=0)
    assert (method.early_stop.metric, method.early_stop.patience) == ("val_loss", 50)
    assert build(patience=None).early_stop is None


def test_only_phi_travels_and_each_budget_has_its_own_training() -> None:
    method = build(rank=3)
    ctx = context(method, [5])
    assert {s.name.split(".")[0] for s in ctx.params.of_scope(Scope.SHARED)} == {"lrnet", MULTIPLIERS}
    assert not ctx.params.of_scope(Scope.PRIVATE)
    assert ctx.params["lora_A.classifier"].shape == (1, 3, 16)
    assert method.per_budget
    assert not build(one_for_all=True).per_budget
    assert method.requires == {Capability.SECOND_ORDER}


def test_personalising_can_leave_the_validation_texts_out() -> None:
    lanes, probe = toy_lanes([9]), make_batch([toy_examples("probe", 5)], [np.arange(5)], 0)
    found = {}
    for texts in ("all", "train_split"):
        method = build(personalise_on=texts)
        ctx = context(method, [], lanes=lanes, budgets=(2,))
        say_one(ctx)
        found[texts] = method.personaliser(replace(ctx, stage="personalise")).logits(probe).detach()
    lora = build_method("lora", TUNE, 2)
    ctx = toy_context(toy_net(), [split(lanes[0], 3, 0.2)[0]], r_max=2, budgets=(2,))
    expected = lora.personaliser(replace(ctx, stage="personalise")).logits(probe).detach()
    torch.testing.assert_close(found["train_split"], expected, rtol=1e-6, atol=1e-9)
    assert not torch.allclose(found["all"], expected, rtol=1e-6, atol=1e-9)


def test_held_batches_are_one_update_with_the_sum_of_their_gradients() -> None:
    method = build()
    ctx = context(method, [8])
    names = lora_names(ctx.net)
    start = {name: ctx.params[name].detach().clone() for name in names}
    rates = torch.full((1, len(names)), 1e-2, dtype=torch.float64)
    fine_tune(ctx, rates, InnerLoop(1, 4, "x", hold_first=True))
    after = {name: ctx.params[name].detach().clone() for name in names}
    set_lora(ctx, start)
    gradient = [torch.zeros_like(value) for value in start.values()]
    for index in ctx.training_order(1, 4, "x")[0]:
        batch = make_batch([ctx.lanes[0].train], [index], 0)
        loss = lane_cross_entropy(ctx.net.logits(batch), batch).sum()
        parts = torch.autograd.grad(loss, [ctx.params[name] for name in names])
        gradient = [a + b for a, b in zip(gradient, parts, strict=True)]
    for name, g in zip(names, gradient, strict=True):
        torch.testing.assert_close(after[name], start[name] - 1e-2 * g / (g.abs() + 1e-8), rtol=1e-6, atol=1e-9)


def test_the_reference_is_every_deviation_at_once_and_single_switches_win() -> None:
    cfg = FedL2PConfig.model_validate({"reference": True, "lrnet": {"clip": "value"}})
    assert (cfg.lrnet.clip, cfg.lrnet.weights, cfg.personalise_on) == ("value", "bfloat16", "train_split")
    assert (cfg.hypergradient.form, cfg.hypergradient.share_losses, cfg.hypergradient.times_psi) == (
        "implicit",
        True,
        False,
    )
    assert (cfg.constant_correction, cfg.hold_first, cfg.finetune.max_grad_norm) == (True, True, 1.0)
    assert (cfg.lrnet.features_eps, FedL2PConfig().lrnet.features_eps) == (1e-5, 0.0)
    padded = FedL2PConfig.for_task({"reference": True}, task_config("xnli"))
    assert FedL2PConfig.model_validate(padded).lrnet.features_pad_to == 128
    assert FedL2PConfig.for_task({}, task_config("xnli")) == {}
    method = build(reference=True)
    ctx = context(method, [9, 5], toy_net(torch.float32))
    before = ctx.params.flat(Scope.SHARED).clone()
    method.local_update(ctx)
    assert bool(torch.isfinite(ctx.params.flat(Scope.SHARED)).all())
    assert not torch.equal(ctx.params.flat(Scope.SHARED), before)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_bfloat16_compute_gives_nearly_the_float32_hypergradient(attention: str) -> None:
    found = []
    for dtype in ("float32", "bfloat16"):
        method, net = build(outer_steps=1), toy_net(torch.float32)
        net.model.set_attn_implementation(attention)
        net.compute_type = torch.bfloat16 if dtype == "bfloat16" else None
        ctx = context(method, [9, 5], net)
        method.local_update(ctx)
        found.append(ctx.params[MULTIPLIERS].grad.flatten())
    assert found[1].dtype is torch.float32
    assert float(torch.nn.functional.cosine_similarity(*found, dim=0)) > 0.95


def test_defaults_are_the_papers() -> None:
    cfg = FedL2PConfig()
    assert cfg.hypergradient == HypergradientConfig(terms=3, psi=0.1, pairs=16, form="lookahead")
    assert (cfg.finetune.lr, cfg.finetune.epochs, cfg.finetune.batch_size) == (1e-4, 2, 32)
    assert (cfg.outer_steps, cfg.validation, cfg.patience) == (3, 0.2, 50)
    assert (cfg.lrnet.hidden, cfg.lrnet.lr, cfg.lrnet.multiplier_lr) == (100, 1e-4, 1e-6)
    assert (cfg.lrnet.clip, cfg.lrnet.clip_at) == ("value", 1.0)
