"""AdaLoRA keeps its budget whatever the client's size, repeats itself to the byte and leaves the base model alone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_context, toy_lanes, toy_net, warnings_of

from fedtailor.adapters.svd_lora import SvdLora, orthogonality, svd_names
from fedtailor.core.errors import ConfigError
from fedtailor.experiment.compose import compose
from fedtailor.federated.context import ClientContext, Lane
from fedtailor.federated.method import Personalised
from fedtailor.lanes.batches import LaneBatch, make_batch
from fedtailor.lanes.layers import Branch
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.methods.adalora import AdaLoraConfig
from fedtailor.methods.adalora_budget import RankBudget, Schedule
from fedtailor.training import local

FAST = {"lr": 1e-2, "batch_size": 4, "epochs": 2}


def context(net: LaneNet, lanes: list[Lane], budgets: tuple[int, ...] = (2,)) -> ClientContext:
    return toy_context(net, lanes, r_max=4, budgets=budgets)


def personalise(ctx: ClientContext, **how: Any) -> Personalised:
    return build_method("adalora", FAST | how, 4).personaliser(ctx)


def exported(made: Personalised) -> list[dict[str, bytes]]:
    assert made.export is not None
    return [made.export(lane, "base") for lane in range(len(made.lanes))]


def weights(net: LaneNet) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in net.model.state_dict().items()}


def test_the_defaults_are_the_papers() -> None:
    cfg = AdaLoraConfig()
    assert (cfg.lr, cfg.epochs, cfg.batch_size, cfg.delta_t, cfg.orth) == (1e-3, 2, 32, 1, 0.1)
    assert (cfg.t_init, cfg.t_final, cfg.beta1, cfg.beta2) == (0.1, 0.3, 0.85, 0.85)
    assert [cfg.init_rank(r) for r in (2, 4, 8, 16)] == [3, 6, 12, 24]


def test_no_client_shares_a_forward_pass_and_there_are_no_rounds() -> None:
    method = build_method("adalora", {}, 4)
    assert method.one_lane
    assert not method.lanes
    assert method.local_update is None
    assert method.personaliser.budgeted


def test_reference_sets_every_deviation_and_a_single_switch_wins() -> None:
    cfg = AdaLoraConfig.model_validate({"reference": True, "alpha": 16})
    assert (cfg.alpha, cfg.max_grad_norm, cfg.orth, cfg.final_mask) == (16.0, 1.0, 0.0, "if_reached")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adalora.init_mul=0.5", "'adalora.init_mul': input should be greater than or equal to 1, got 0.5"),
        ("adalora.delta_t=0", "'adalora.delta_t': input should be greater than or equal to 1, got 0"),
        ("adalora.beta1=1", "'adalora.beta1': input should be less than 1, got 1"),
        ("adalora.final_mask=never", "'adalora.final_mask': allowed: always, if_reached, got 'never'"),
        ("adalora.t_init=0.8", "'adalora.t_init' (0.8) and 'adalora.t_final' (0.3) must add up to less than 1"),
    ],
)
def test_a_value_that_cannot_be_is_named_with_what_is_allowed(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose([], [override])


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 20])
def test_every_client_keeps_r_ranks_per_layer_however_few_steps_it_has(steps: int) -> None:
    ctx = context(toy_net(torch.float32), toy_lanes([steps]), (1, 2, 4))
    made = personalise(ctx, batch_size=1, epochs=1)
    assert made.ranks is not None
    assert made.selects_ranks
    layers = len(ctx.net.adapted)
    assert made.ranks.shape == (3, layers)
    assert made.ranks.sum(1).tolist() == [r * layers for r in (1, 2, 4)]
    assert [lane.budget for lane in made.lanes] == [1, 2, 4]
    for layer, most in zip(ctx.net.layers, made.ranks.amax(0).tolist(), strict=True):
        assert (0 if layer.lam is None else layer.lam.shape[1]) == most


def test_without_the_enforced_mask_a_tiny_client_stays_above_its_budget_and_says_so() -> None:
    ctx = context(toy_net(), toy_lanes([2]))
    made = personalise(ctx, batch_size=1, epochs=1, final_mask="if_reached")
    assert made.ranks is not None
    assert int(made.ranks.sum()) > 2 * len(ctx.net.adapted)
    assert not made.selects_ranks
    assert "never came to its final mask" in warnings_of(ctx)[0][1]
    large = context(toy_net(), toy_lanes([20]))
    assert personalise(large, batch_size=1, epochs=1, final_mask="if_reached").selects_ranks
    assert not warnings_of(large)


def test_full_budget_keeps_every_rank_of_every_layer() -> None:
    ctx = context(toy_net(), toy_lanes([9]), (1, 4))
    made = personalise(ctx, init_mul=1.0)
    assert made.ranks is not None
    assert made.ranks.tolist() == [[r] * len(ctx.net.adapted) for r in (1, 4)]


def fresh_budget(rank: int, target: int) -> tuple[ClientContext, RankBudget]:
    net = toy_net()
    ctx = toy_context(net, toy_lanes([5]), SvdLora(rank, 1.0))
    return ctx, RankBudget(net, ctx.params, Schedule(rank, target, 1, 0.1, 0.3, 1, (0.85, 0.85)))


def test_scores_that_say_nothing_give_plain_lora() -> None:
    ctx, budget = fresh_budget(3, 2)
    for adapted in ctx.net.adapted:
        ctx.params.set(f"lora_E.{adapted.name}", torch.arange(1.0, 4.0))
    budget.after_step(0)
    budget.close()
    assert budget.kept.tolist() == [[True, True, False]] * len(ctx.net.adapted)
    for adapted in ctx.net.adapted:
        assert ctx.params[f"lora_E.{adapted.name}"][0].tolist() == [1.0, 2.0, 0.0]


def test_ties_at_the_threshold_do_not_cost_a_rank_and_clear_winners_stay() -> None:
    ctx, budget = fresh_budget(3, 2)
    winner = f"lora_E.{ctx.net.adapted[5].name}"
    for name in svd_names(ctx.net):
        ctx.params.set(name, torch.ones_like(ctx.params[name][0]))
    ctx.params[winner].grad[0, 2] = 1.0
    budget.after_step(0)
    budget.close()
    kept = budget.kept
    assert int(kept.sum()) == 2 * len(ctx.net.adapted)
    assert kept[5, 2]
    assert not kept[[i for i in range(len(kept)) if i != 5]][:, 2].any()


def test_a_client_whose_loss_is_not_finite_is_refused_by_name_of_the_cause() -> None:
    net = toy_net()
    with torch.no_grad():
        net.layers[3].base.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match="importance scores are not finite"):
        personalise(context(net, toy_lanes([9])))
    assert all(layer.a is None for layer in net.layers)


def test_orthogonality_is_the_mean_distance_from_orthonormal_vectors() -> None:
    net = toy_net()
    ctx = toy_context(net, toy_lanes([5]), SvdLora(2, 1.0))
    for name in svd_names(net):
        ctx.params.set(name, torch.eye(*ctx.params[name].shape[1:]) if "_E" not in name else torch.zeros(2))
    assert orthogonality(net, ctx.params).tolist() == [0.0]
    first = f"lora_A.{net.adapted[0].name}"
    ctx.params.set(first, ctx.params[first].detach() * 2)
    # 4 I - I has norm 3 sqrt(2), one of 2 L matrices.
    expected = 3 * math.sqrt(2) / (2 * len(net.adapted))
    assert orthogonality(net, ctx.params).item() == pytest.approx(expected)


def test_initial_values_depend_on_seed_and_layer_alone() -> None:
    net = toy_net()
    wide, narrow = (SvdLora(r, 1.0, 6).initial(net, 3) for r in (6, 3))
    other = SvdLora(6, 1.0, 6).initial(net, 4)
    for adapted in net.adapted:
        a, b = f"lora_A.{adapted.name}", f"lora_B.{adapted.name}"
        assert torch.equal(wide[a][:3], narrow[a])
        assert torch.equal(wide[b][:, :3], narrow[b])
        assert not torch.equal(wide[a], other[a])
        assert 0.01 < wide[a].std() < 0.03


def test_running_twice_gives_the_same_bytes_whatever_torchs_global_state() -> None:
    lanes, runs = toy_lanes([9, 5]), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        runs.append(exported(personalise(context(toy_net(torch.float32), lanes, (1, 2)))))
    assert runs[0] == runs[1]


def test_neither_other_clients_nor_other_budgets_change_a_byte() -> None:
    lanes = toy_lanes([9, 5])
    together = exported(personalise(context(toy_net(torch.float32), lanes, (1, 2, 4))))
    alone = exported(personalise(context(toy_net(torch.float32), lanes[1:], (2,))))
    assert together[4] == alone[0]


def test_logits_of_lanes_side_by_side_are_those_of_each_alone() -> None:
    net, lane = toy_net(), toy_lanes([9])
    made = personalise(context(net, lane, (1, 2, 4)))
    wide = context_batch(lane * 3)
    together = made.logits(wide)
    for k, budget in enumerate((1, 2, 4)):
        alone = personalise(context(net, lane, (budget,))).logits(context_batch(lane))
        torch.testing.assert_close(together[k], alone[0], rtol=1e-9, atol=1e-12)


def context_batch(lanes: list[Lane]) -> LaneBatch:
    return make_batch([lane.train for lane in lanes], [np.arange(4)] * len(lanes), 0)


def crash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Crashing(local.LaneAdam):
        def step(self, lanes: int) -> None:
            super().step(lanes)
            if float(self.steps[0]) == 2:
                raise RuntimeError("out of memory")

    monkeypatch.setattr(local, "LaneAdam", Crashing)


@pytest.mark.parametrize("fails", [False, True], ids=["after success", "after an exception"])
def test_the_base_model_is_untouched(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = toy_net(torch.float32)
    before, modules = weights(net), [type(m) for m in net.model.modules()]
    ctx = context(net, toy_lanes([9]), (1, 2))
    clean = net.logits(context_batch(toy_lanes([9])))
    if fails:
        crash(monkeypatch)
        with pytest.raises(RuntimeError, match="out of memory"):
            personalise(ctx)
        assert all(layer.a is None for layer in net.layers)
        assert not net.state.training
    else:
        made = personalise(ctx)
        assert not torch.equal(made.logits(context_batch(toy_lanes([9]) * 2))[0], clean[0])
        net.unbind()
    assert weights(net) == before
    assert [type(m) for m in net.model.modules()] == modules
    assert not any(p.requires_grad or p.grad is not None for p in net.model.parameters())
    assert torch.equal(net.logits(context_batch(toy_lanes([9]))), clean)


def test_training_sees_what_lies_over_the_base() -> None:
    """A client's own low-rank part of the base is the same as a base with that part merged in."""
    draw = torch.Generator().manual_seed(1)
    a, b = (torch.randn(shape, generator=draw).double() for shape in ((1, 2, 16), (1, 4, 2)))
    lane = toy_lanes([9])
    over, merged, bare = toy_net(), toy_net(), toy_net()
    over.layers[-1].overlay = Branch(a, b, 0.5)
    over.overlay_index = {lane[0].client.id: 0}
    with torch.no_grad():
        merged.layers[-1].base.weight += 0.5 * b[0] @ a[0]
    made = [personalise(context(net, lane)).logits(context_batch(lane)) for net in (over, merged, bare)]
    torch.testing.assert_close(made[0], made[1], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(made[0], made[2])


def test_the_data_order_is_loras(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []
    original = ClientContext.training_order

    def spy(self: ClientContext, epochs: int, batch_size: int, purpose: str) -> Any:
        seen.append((purpose, epochs, batch_size))
        return original(self, epochs, batch_size, purpose)

    monkeypatch.setattr(ClientContext, "training_order", spy)
    ctx = replace(context(toy_net(), toy_lanes([9])), stage="personalise")
    personalise(ctx)
    build_method("lora", FAST, 4).personaliser(ctx)
    assert seen == [("personalise", 2, 4)] * 2
