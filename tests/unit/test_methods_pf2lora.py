"""PF2LoRA: what its step is, and what it becomes at the edges of its switches."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor
from toy import toy_context, toy_lanes, toy_llama, toy_net, with_prompts, write_adapter

from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import Scope
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import method_of
from fedtailor.experiment.plan import make_plan, method_sizes
from fedtailor.experiment.rules import check_whole_logits
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.layers import detach
from fedtailor.lanes.loss import lane_losses
from fedtailor.methods import build_method

HOW = {"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3, "private_rank": 2, "inner_lr": 0.3}
COMMON = {key: HOW[key] for key in ("lr", "batch_size", "local_steps", "rank")}
ORDERS = ("second", "finite_difference", "first", "joint")
SIZES = (9, 6)


def context(method: Method, spread: bool = True, lanes: int = 2, **more: Any) -> ClientContext:
    """Two clients; with ``spread`` x and y are where training would have brought them, not at B = D = 0."""
    ctx = toy_context(toy_net(), toy_lanes(SIZES)[:lanes], method.adapter, method.modules, **more)
    draw = torch.Generator().manual_seed(11)
    for spec in method.adapter.specs(ctx.net) if spread else ():
        old = ctx.params[spec.name].detach()
        noise = torch.randn(old.shape, generator=draw, dtype=old.dtype)
        ctx.params.set(spec.name, old + 0.1 * noise)
    return ctx


def played(changes: dict[str, Any], spread: bool = True, **more: Any) -> tuple[ClientContext, dict[str, Tensor]]:
    method = build_method("pf2lora", HOW | changes, 4)
    ctx = context(method, spread, **more)
    report = method.local_update(ctx)
    return ctx, dict(report.metrics)


def values(ctx: ClientContext, *prefixes: str) -> Tensor:
    """Parameters of these prefixes, and the head's for "common", (K, P)."""
    named = [s.name for s in ctx.params.specs if s.name.startswith(prefixes)]
    named += [s.name for s in ctx.params.specs if s.name.startswith("classifier") and prefixes[0] in ("common", "lora")]
    return torch.cat([ctx.params[name].detach().flatten(1) for name in named], 1)


def close(one: Tensor, two: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(one, two, rtol=rtol, atol=1e-11)


def homlora(start: ClientContext | None = None) -> ClientContext:
    method = build_method("homlora", COMMON, 4)
    ctx = context(method, spread=False)
    for spec in method.adapter.specs(ctx.net) if start else ():
        ctx.params.set(spec.name, start.params[spec.name.replace("lora_", "common_")])
    method.local_update(ctx)
    return ctx


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_rate_and_with_d_zero_it_is_homlora(order: str) -> None:
    ctx, _ = played({"order": order, "inner_lr": 0.0}, spread=False)
    close(values(ctx, "common"), values(homlora(), "lora"))
    assert not values(ctx, "own_B").any()


@pytest.mark.parametrize("order", ORDERS)
def test_without_private_ranks_it_is_homlora(order: str) -> None:
    method = build_method("pf2lora", HOW | {"private_rank": 0, "order": order}, 4)
    expected = homlora(context(method))
    ctx = context(method)
    report = method.local_update(ctx)
    close(values(ctx, "common"), values(expected, "lora"))
    assert set(report.metrics) == {"train_loss"}
    assert not method.requires


def test_a_step_is_the_five_lines_of_the_paper() -> None:
    """Written down once more with plain autograd, for one client and two steps."""
    method = build_method("pf2lora", HOW | {"local_steps": 2, "batches": 4}, 4)
    ctx = toy_context(toy_net(), toy_lanes([9]), method.adapter, method.modules)
    net, pair = ctx.net, method.adapter
    pair.switch(net, ctx.params, "joint")
    x, y = ([ctx.params[n] for n in part.names(net)] for part in (pair.first, pair.second))
    adamw = torch.optim.AdamW(x, lr=5e-3, weight_decay=0.01)
    streams = {
        name: ctx.batches([lane[:2] for lane in ctx.training_order(1, 4, f"train{name}")])
        for name in ("", "/inner", "/v", "/cross")
    }
    for step in range(2):
        outer, inner, own, cross = (next(stream) for stream in streams.values())
        old = [t.detach().clone() for t in y]
        slope = torch.autograd.grad(lane_losses(net, inner).sum(), y)
        new = [a - 0.3 * s for a, s in zip(old, slope, strict=True)]
        put(y, new)
        g = torch.autograd.grad(lane_losses(net, outer).sum(), x)
        v = torch.autograd.grad(lane_losses(net, own).sum(), y)
        put(y, old)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            again = torch.autograd.grad(lane_losses(net, cross).sum(), y, create_graph=True)
            term = torch.autograd.grad(sum((a * b).sum() for a, b in zip(again, v, strict=True)), x)
        assert step == 0 or any(t.any() for t in term)
        for leaf, a, b in zip(x, g, term, strict=True):
            leaf.grad.copy_(a - 0.3 * b)
        put(y, new)
        adamw.step()
    other = toy_context(toy_net(), toy_lanes([9]), method.adapter, method.modules)
    method.local_update(other)
    close(values(other, "common"), values(ctx, "common"))
    close(values(other, "own"), values(ctx, "own"))


def put(leaves: Any, new: Any) -> None:
    with torch.no_grad():
        for leaf, value in zip(leaves, new, strict=True):
            leaf.copy_(value)


def test_joint_is_two_optimizer_steps_at_one_point() -> None:
    method = build_method("pf2lora", HOW | {"order": "joint"}, 4)
    ctx = context(method)
    net, pair = ctx.net, method.adapter
    pair.switch(net, ctx.params, "joint")
    x, y = ([ctx.params[n] for n in part.names(net)] for part in (pair.first, pair.second))
    steps = [torch.optim.AdamW(x, lr=5e-3, weight_decay=0.01), torch.optim.SGD(y, lr=0.3)]
    streams = [ctx.batches([(2 * lane)[:3] for lane in order]) for order in orders(ctx)]
    for outer, inner in zip(*streams, strict=True):
        found = [torch.autograd.grad(lane_losses(net, b).sum(), part) for b, part in ((outer, x), (inner, y))]
        for part, gradients in zip((x, y), found, strict=True):
            for leaf, value in zip(part, gradients, strict=True):
                leaf.grad.copy_(value)
        for step in steps:
            step.step()
    other, metrics = played({"order": "joint"})
    close(values(other, "common"), values(ctx, "common"))
    close(values(other, "own"), values(ctx, "own"))
    assert "cross_share" not in metrics


def orders(ctx: ClientContext) -> list[Any]:
    """Three steps of four rows, in as many passes as the smaller client needs."""
    return [[lane[:3] for lane in ctx.training_order(2, 4, purpose)] for purpose in ("train", "train/inner")]


def test_first_order_is_the_second_without_its_term(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtailor.methods import pf2lora

    first, _ = played({"order": "first"})
    second, metrics = played({"order": "second"})
    assert not torch.allclose(values(first, "common"), values(second, "common"), rtol=1e-6)
    assert (metrics["cross_share"] > 1e-3).all()
    monkeypatch.setattr(pf2lora, "product", lambda ctx, batch, of, by, v: [torch.zeros_like(t) for t in by])
    dropped, metrics = played({"order": "second"})
    close(values(dropped, "common"), values(first, "common"))
    close(values(dropped, "own"), values(first, "own"))
    assert not metrics["cross_share"].any()


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["", "one dropout mask for both derivatives"])
def test_a_difference_of_gradients_takes_the_same_steps(dropout: float) -> None:
    how = {"optimizer": "sgd", "lr": 0.1, "dropout": dropout}
    runs = {order: played(how | {"order": order}) for order in ("second", "finite_difference", "first")}
    exact, near, without = (values(ctx, "common") for ctx, _ in runs.values())
    assert ((near - exact).norm(dim=1) < 3e-3 * (without - exact).norm(dim=1)).all()
    shares = [runs[order][1]["cross_share"] for order in ("finite_difference", "second")]
    torch.testing.assert_close(*shares, rtol=3e-3, atol=0)


def test_where_the_term_is_taken_is_a_switch() -> None:
    rows = [values(played({"cross_at": at})[0], "common") for at in ("old", "new")]
    assert not torch.allclose(*rows, rtol=1e-6)


def test_the_base_s_dropout_has_one_mask_for_both_derivatives_too() -> None:
    ends = []
    for order in ("second", "finite_difference", "first"):
        method = build_method("pf2lora", HOW | {"order": order, "optimizer": "sgd", "lr": 0.1, "local_steps": 1}, 4)
        ctx = context(method, lanes=1)
        ctx.net.base_dropout = 0.3
        with torch.random.fork_rng():
            torch.manual_seed(5)
            method.local_update(ctx)
        ends.append(values(ctx, "common"))
    exact, near, without = ends
    assert (near - exact).norm() < 3e-3 * (without - exact).norm()


@pytest.mark.parametrize("order", ["second", "finite_difference", "first"])
def test_activation_checkpointing_changes_nothing(order: str) -> None:
    ends = []
    for checkpointing in (False, True):
        method = build_method("pf2lora", HOW | {"order": order, "dropout": 0.2}, 4)
        net, lanes = toy_llama(checkpointing=checkpointing), with_prompts(toy_lanes(SIZES))
        ctx = toy_context(net, lanes, method.adapter, method.modules)
        method.local_update(ctx)
        ends.append(values(ctx, "common"))
    close(ends[1], ends[0], rtol=1e-7)


@pytest.mark.parametrize("order", ["second", "finite_difference"])
def test_a_step_in_parts_is_the_same_step(order: str) -> None:
    whole, _ = played({"order": order, "optimizer": "sgd", "lr": 0.1})
    parts, _ = played({"order": order, "optimizer": "sgd", "lr": 0.1}, micro_batch=1)
    close(values(parts, "common"), values(whole, "common"), rtol=1e-7)


@pytest.mark.parametrize("start", ["lora", "normal_a", "normal"])
def test_two_sides_start_as_one_lora_of_both_ranks(start: str) -> None:
    changes = {"start": start}
    method = build_method("pf2lora", HOW | changes, 4)
    wide = build_method("homlora", COMMON | {"rank": 5} | changes, 4)
    ctx, one = context(method, spread=False), context(wide, spread=False)
    for name in (s.name for s in ctx.params.specs if s.name.startswith("own")):
        both = torch.cat([ctx.params[name.replace("own", "common")], ctx.params[name]], 1 if "own_A" in name else 2)
        assert torch.equal(both, one.params[name.replace("own", "lora")])
        assert bool(both.any()) == (start == "normal" or "own_A" in name)
        if both.any():
            assert bool(both.abs().max() > 1) == (start != "lora")


def test_an_orthogonal_start_leaves_the_common_side_and_what_is_new_of_the_other() -> None:
    sides = {}
    for start in ("normal", "orthogonal"):
        params = context(build_method("pf2lora", HOW | {"start": start}, 4), spread=False).params
        sides[start] = {
            s.name: params[s.name][0].detach() for s in params.specs if s.name.startswith(("common", "own"))
        }
    for name, own in sides["orthogonal"].items():
        if name.startswith("common"):
            assert torch.equal(own, sides["normal"][name])
            continue
        common = sides["orthogonal"][name.replace("own", "common")]
        across = own @ common.T if "own_A" in name else own.T @ common
        assert across.abs().max() < 1e-5 < own.abs().max()
        rest = sides["normal"][name] - own
        inside = torch.cat([common, rest], 0 if "own_A" in name else 1)
        assert torch.linalg.matrix_rank(inside, rtol=1e-5) == torch.linalg.matrix_rank(common)


def test_the_common_part_travels_and_the_rest_stays() -> None:
    method = build_method("pf2lora", HOW, 4)
    ctx = context(method)
    owners = {spec.name.split("_")[0].split(".")[0]: spec.scope for spec in ctx.params.specs}
    assert owners == {"common": Scope.SHARED, "classifier": Scope.SHARED, "own": Scope.PRIVATE, "adam": Scope.PRIVATE}
    assert method.requires == {Capability.SECOND_ORDER}
    assert all(not build_method("pf2lora", HOW | {"order": o}, 4).requires for o in ORDERS[1:])


def personalised(
    changes: dict[str, Any], fresh: tuple[bool, bool], rounds: int = 1
) -> tuple[ClientContext, Any, list[Any]]:
    method = build_method("pf2lora", HOW | changes, 4)
    ctx = context(method)
    for number in range(rounds):
        method.local_update(replace(ctx, round=number))
    trained = [values(ctx, part).clone() for part in ("common", "own")]
    ctx = replace(ctx, stage="personalise", fresh=torch.tensor(fresh))
    with torch.no_grad():
        mean = ctx.params.flat(Scope.SHARED).mean(0)
        ctx.params.flat(Scope.SHARED).copy_(mean)
    return ctx, method.personaliser(ctx), trained


def test_a_client_that_no_round_met_trains_its_own_part_alone() -> None:
    ctx, made, (_, own) = personalised({}, (False, True))
    common = values(ctx, "common")
    assert torch.equal(common[0], common[1])
    moved = (values(ctx, "own") != own).any(1).tolist()
    assert moved == [False, True]
    assert made.metrics["own_steps_when_new"].tolist() == [0.0, 3.0]


def test_the_client_s_own_common_part_is_that_before_the_mean() -> None:
    ctx, _, (common, own) = personalised({"evaluate": "local"}, (False, True))
    shared = ctx.params.flat(Scope.SHARED)
    assert torch.equal(values(ctx, "common")[0], common[0])
    assert not torch.equal(shared[0], shared[1])
    assert torch.equal(values(ctx, "own")[0], own[0])


def test_algorithm_1_averages_after_the_first_of_every_i_steps() -> None:
    ctx, _, _ = personalised({"sync": "alg1", "evaluate": "local"}, (False, True), rounds=3)
    assert float(ctx.params["adam.steps"].detach()[0]) == 1 + 3 + 3 + 2, (
        "T = R I, the last average after step (R - 1) I + 1"
    )
    shared = ctx.params.flat(Scope.SHARED)
    assert not torch.equal(shared[0], shared[1])
    ctx, _, _ = personalised({"sync": "alg1"}, (False, False), rounds=3)
    assert ctx.params["adam.steps"].flatten().tolist() == [7.0, 7.0]


@pytest.mark.parametrize("head", ["shared", "frozen"])
@pytest.mark.parametrize("kind", ["texts", "talk"])
def test_peft_scores_the_stacked_adapter_as_the_run_did(tmp_path: Path, kind: str, head: str) -> None:
    method = build_method("pf2lora", HOW | {"head": head, "scale": 1.7}, 4)
    texts = kind == "texts"
    lanes = toy_lanes(SIZES) if texts else with_prompts(toy_lanes(SIZES))
    net = toy_net(torch.float32) if texts else toy_llama(torch.float32)
    ctx = toy_context(net, lanes, method.adapter, method.modules)
    method.local_update(ctx)
    draw = torch.Generator().manual_seed(2)
    for name in method.adapter.second.names(net):
        ctx.params.set(name, torch.randn(ctx.params[name].shape, generator=draw) * 0.3)
    ctx = replace(ctx, stage="personalise", fresh=torch.tensor([False, False]))
    made = method.personaliser(ctx)
    batch = make_batch([lane.train for lane in lanes], [torch.arange(3).numpy()] * 2, 0)
    with torch.no_grad():
        ours = made.logits(batch)[1]
    write_adapter(made.export(1, "base"), tmp_path / "adapter")
    net.unbind()
    detach(net.model, net.layers)
    model = copy.deepcopy(net.model).eval()
    plain = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    assert {m.lora_A["default"].out_features for m in plain.modules() if isinstance(m, LoraLayer)} == {5}
    with torch.no_grad():
        theirs = plain(input_ids=batch.input_ids[1], attention_mask=batch.attention_mask[1]).logits
    if not texts:
        theirs = theirs.flatten(0, 1)[batch.positions[1]]
    torch.testing.assert_close(theirs[batch.valid[1]], ours[batch.valid[1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("pf2lora.private_rank=-1", "pf2lora.private_rank"),
        ("pf2lora.rank=0", "pf2lora.rank"),
        ("pf2lora.inner_lr=-1e-3", "pf2lora.inner_lr"),
        ("pf2lora.order=third", "second, finite_difference, first, joint"),
        ("pf2lora.batches=3", "pf2lora.batches"),
        ("pf2lora.difference=0", "pf2lora.difference"),
        ("perfedavg_lora.personal_steps=-1", "perfedavg_lora.personal_steps"),
        ("homlora.local_steps=0", "homlora.local_steps"),
        ("homlora.head=own", "shared, frozen, client"),
        ("model.attention=flash_attention_2", "sdpa, eager, auto"),
    ],
)
def test_bad_keys_are_named(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([], ["methods=[pf2lora,perfedavg_lora,homlora]", override])
    assert words in str(error.value)


def test_second_derivatives_of_logits_in_pieces_are_refused_before_work_starts() -> None:
    words = ["task=cldr_instruct", "base=none", "methods=[pf2lora,homlora]", "task.max_length=512"]
    words += ["pf2lora.batch_size=64", "homlora.batch_size=64"]
    with pytest.raises(ConfigError) as error:
        check_whole_logits(compose([], words))
    assert str(error.value).strip() == (
        "'pf2lora.batch_size' = 64: second derivatives need all logits of a client's step at once, and those of 64 "
        "rows of 512 tokens and 4,000 classes are 131,072,000; above 67,108,864 they are taken in pieces, which have "
        "none. Use engine.micro_batch=32, or a form without them (pf2lora.order)"
    )
    for way_out in ("engine.micro_batch=32", "pf2lora.order=finite_difference", "pf2lora.order=first"):
        check_whole_logits(compose([], [*words, way_out]))
    with pytest.raises(ConfigError, match="logits"):
        make_plan(compose([], words))


def test_a_plan_tells_what_is_trained_from_an_optimizer_s_state() -> None:
    exp = compose([], ["base=none", "methods=[homlora,pf2lora]", "homlora.head=frozen", "pf2lora.head=frozen"])
    one, two = (method_sizes(exp, method_of(exp, name), 7) for name in exp.methods)
    per_rank = 2 * 2 * (64 + 64)
    assert (one.shared, one.private, one.state) == (8 * per_rank, 16 * per_rank + 1, 16 * per_rank + 1)
    assert (two.shared, two.private - two.state) == (8 * per_rank, 2 * per_rank)
    assert not one.generators
    assert [method_of(exp, name).passes for name in exp.methods] == [1, 4]
