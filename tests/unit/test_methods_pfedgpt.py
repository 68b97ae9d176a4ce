"""pFedGPT and its rivals: what mixes are at their ends, what none may do worse than, who mixes, what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from toy import as_talk, toy_context, toy_examples, toy_lanes, toy_llama, with_prompts

from fedtailor.core.errors import ConfigError, MethodError
from fedtailor.core.scope import Scope
from fedtailor.experiment.compose import compose
from fedtailor.experiment.mix_rules import check_clusters
from fedtailor.federated.context import ClientContext, Received
from fedtailor.federated.method import Method
from fedtailor.lanes.params import LaneParams
from fedtailor.methods import METHODS, build_method
from fedtailor.methods.mix_gradient import slopes
from fedtailor.methods.pfedgpt import PFedGptConfig
from fedtailor.training.mix_trials import Choice, by_group
from fedtailor.training.mixed_start import MixedStart
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import ends

SIZES = [13, 9, 3]
POOL = as_talk(toy_examples("pool", 12), "pool")
MIXING = ("mix_grid", "mix_random", "mix_gradient", "fdlora", "pfedgpt")
SECTIONS = {name: {**(METHODS[name].tiny or {}), "validation": "global_pool", "dropout": 0.0} for name in MIXING}
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def rows(params: LaneParams, prefix: str) -> torch.Tensor:
    """Parameters of this prefix, (K, P)."""
    named = [s.name for s in params.specs if s.name.startswith(prefix)]
    return torch.cat([params[name].detach().flatten(1) for name in named], 1)


def method_of(name: str, **section: Any) -> Method:
    return build_method(name, {**SECTIONS[name], **section}, 3)


def returning(method: Method, lanes: Sequence[Any]) -> ClientContext:
    """Clients that come back: everything that they kept, and what they receive, is drawn."""
    ctx = toy_context(toy_llama(), lanes, method.adapter, method.modules, validation=POOL)
    shared, own = ctx.params.flat(Scope.SHARED), ctx.params.flat(Scope.PRIVATE)
    sent = 0.3 * drawn(shared[0], 99).unsqueeze(0)
    with torch.no_grad():
        shared.copy_(sent)
        for k, lane in enumerate(lanes):
            own[k] = 0.3 * drawn(own[k], int(lane.client.id[-2:]))
    received = Received(ctx.params.of_scope(Scope.SHARED), sent, [0] * len(lanes))
    return replace(ctx, round=1, received=received, fresh=torch.zeros(len(lanes), dtype=torch.bool))


def drawn(like: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=like.dtype)


def played(method: Method, ctx: ClientContext) -> Mapping[str, torch.Tensor]:
    assert method.local_update is not None
    return method.local_update(ctx).metrics


def talks() -> list[Any]:
    return with_prompts(toy_lanes(SIZES))


def choice(method: Method, ctx: ClientContext) -> tuple[Mixtures, Choice, MixedStart]:
    """The mixtures of all clients, and what a method chooses of them."""
    update = method.local_update
    assert isinstance(update, MixedStart)
    names = list(zip(update.pair.first.names(ctx.net), update.pair.second.names(ctx.net), strict=True))
    own = {sent: ctx.params[mine].detach() for sent, mine in names}
    received = {sent: ctx.received[sent].clone() for sent, _ in names}
    mixtures, lanes = Mixtures(ctx, update.pair.first, own, received, update.cfg.mix), range(len(ctx.lanes))
    return mixtures, update.choose(ctx)(mixtures, lanes, update.rows.of(ctx, lanes)), update


@pytest.mark.parametrize("name", MIXING)
def test_candidates_and_clients_side_by_side_are_one_after_another(name: str) -> None:
    method, lanes = method_of(name), talks()
    together = returning(method, lanes)
    metrics = played(method, together)
    assert (metrics["mix_evaluations"] >= 3).all()
    for k, lane in enumerate(lanes):
        # A token budget of 1: one lane in a forward pass, and one row of it.
        alone = replace(returning(method, [lane]), token_budget=1)
        own = played(method, alone)
        for scope in (Scope.SHARED, Scope.PRIVATE):
            torch.testing.assert_close(together.params.flat(scope)[k], alone.params.flat(scope)[0], **CLOSE)
        for metric, values in metrics.items():
            torch.testing.assert_close(values[k], own[metric][0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("name", "section"),
    [
        *((name, {}) for name in MIXING),
        ("pfedgpt", {"fidelity": "high"}),
        ("pfedgpt", {"fidelity": "low"}),
        ("pfedgpt", {"stages": "two"}),
        ("pfedgpt", {"ends": False}),
        ("mix_random", {"evaluations": 8}),
        ("mix_grid", {"weights": (0.5,)}),
        ("fdlora", {"validation": "own_holdout"}),
    ],
    ids=str,
)
def test_a_plan_counts_at_least_what_a_search_reads(name: str, section: dict[str, Any]) -> None:
    method, lanes = method_of(name, **section), talks()
    ctx = returning(method, lanes)
    found = choice(method, ctx)[1].tokens
    assert method.beside is not None
    for lane, tokens in zip(lanes, found, strict=True):
        rows = lane.train if section.get("validation") == "own_holdout" else POOL
        counted = method.beside(lane.size, len(POOL), 1.0) * int(rows.lengths.max())
        assert tokens <= counted < 8 * tokens, "at most, and not beyond measure"


@pytest.mark.parametrize("changes", [{}, {"mix": "product"}], ids=["factors", "product"])
def test_the_common_lora_always_is_fedavg(changes: dict[str, Any]) -> None:
    method, lanes = method_of("mix_grid", weights=(0,), **changes), talks()
    ctx = returning(method, lanes)
    loss = played(method, ctx)["train_loss"]
    section = {k: v for k, v in SECTIONS["mix_grid"].items() if k in ("lr", "batch_size", "epochs", "rank", "dropout")}
    fedavg = build_method("fedavg", {**section, "adapter": "lora", "targets": ("query", "value")}, 3)
    plain = replace(toy_context(toy_llama(), lanes, fedavg.adapter), round=1)
    with torch.no_grad():
        plain.params.flat(Scope.SHARED).copy_(ctx.received.row(0))
    assert torch.equal(loss, played(fedavg, plain)["train_loss"])
    assert torch.equal(rows(ctx.params, "global"), rows(plain.params, "lora"))
    assert torch.equal(rows(ctx.params, "local"), rows(plain.params, "lora"))


@pytest.mark.parametrize("changes", [{}, {"mix": "product"}], ids=["factors", "product"])
def test_the_own_lora_always_is_local_training_after_the_first_round(changes: dict[str, Any]) -> None:
    method, [lane, *_] = method_of("mix_grid", weights=(1,), **changes), talks()
    ctx = toy_context(toy_llama(), [lane], method.adapter, method.modules, validation=POOL)
    first = ctx.received.row(0).clone()
    fedavg = method_of("mix_grid", weights=(0,))
    plain = toy_context(toy_llama(), [lane], fedavg.adapter, fedavg.modules, validation=POOL)
    for round in range(3):
        played(method, replace(ctx, round=round, fresh=torch.tensor([round == 0])))
        # Whatever is sent, it goes on from its own; and who is alone receives what it sent.
        with torch.no_grad():
            ctx.params.flat(Scope.SHARED).copy_(first)
        shared = plain.params.flat(Scope.SHARED).clone()
        got = Received(plain.params.of_scope(Scope.SHARED), shared, [0])
        played(fedavg, replace(plain, round=round, received=got, fresh=torch.tensor([round == 0])))
        assert torch.equal(rows(ctx.params, "local"), rows(plain.params, "global"))


def test_who_is_new_or_still_starting_slowly_begins_at_what_it_received() -> None:
    method = method_of("pfedgpt", slow_start=True, window=1, t_max=4, delta_max=0.0)
    ctx = replace(returning(method, talks()), fresh=torch.tensor([True, False, False]))
    with torch.no_grad():
        ctx.params["slow_start.over"].copy_(torch.tensor([[1.0], [0.0], [1.0]]))
    metrics = played(method, ctx)
    assert metrics["slow_start"].tolist() == [1.0, 1.0, 0.0]
    assert metrics["mix_evaluations"][:2].tolist() == [0.0, 0.0]
    assert metrics["mix_evaluations"][2] > 0
    assert list(ctx.searched) == [ctx.lanes[2].client.id]
    assert ctx.searched[ctx.lanes[2].client.id] > 0
    weights = torch.stack([v for name, v in metrics.items() if name.startswith("mix_weight.")])
    assert {name for name in metrics if name.startswith("mix_weight.")} == {
        f"mix_weight.{kind}.{block}" for kind in ("q_proj", "v_proj") for block in (0, 1)
    }
    assert (weights[:, :2] == 0).all()
    late = replace(returning(method, talks()), round=4)
    with torch.no_grad():
        late.params["slow_start.over"].zero_()
    assert played(method, late)["slow_start"].tolist() == [0.0] * 3


def test_slow_start_ends_for_good_when_the_loss_of_two_windows_is_about_the_same() -> None:
    method = method_of("pfedgpt", slow_start=True, window=2, delta_max=0.05, t_max=99)
    ctx = toy_context(toy_llama(), talks(), method.adapter, method.modules, validation=POOL)
    update = method.local_update
    assert isinstance(update, MixedStart)
    start = {name: ctx.params[name].detach().clone() for name in update.pair.first.names(ctx.net)}
    over = []
    for falling in (8.0, 4.0, 2.0, 1.0, 0.5, 9.0):
        losses = torch.tensor([falling, 2.0, 2.0 + 0.05 * (falling > 3)], dtype=torch.float64)
        update.memory.keep(ctx, start, losses)
        over.append(ctx.params["slow_start.over"][:, 0].tolist())
    # Losses are known for two windows after four rounds; 2.05, 2.05 to 2, 2 is 2.4 %.
    assert over == [[0, 0, 0]] * 3 + [[0, 1, 1]] * 3


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("rule", ["factors", "product"])
def test_no_choice_is_worse_on_the_full_set_than_either_lora(name: str, rule: str) -> None:
    if (name, rule) == ("mix_gradient", "product"):
        return
    method = method_of(name, mix=rule)
    ctx = returning(method, talks())
    mixtures, found, update = choice(method, ctx)
    lanes = list(range(3))
    texts = [own.high for own in update.rows.of(ctx, lanes)]
    layers = by_group(np.arange(len(mixtures.layers)))
    received, own = (mixtures.losses(lanes, layers(np.tile(end, (3, 1))), texts) for end in ends(4))
    chosen = mixtures.losses(lanes, found.shares, texts)
    assert (chosen <= np.minimum(received, own) + 1e-12).all()
    np.testing.assert_allclose(found.gain, received - chosen, atol=1e-9)


def test_all_variants_of_table_4_evaluate_equally_often() -> None:
    for stages in ("one", "two", "both"):
        for fidelity in ("low", "high", "low_to_high"):
            cfg = PFedGptConfig(stages=stages, fidelity=fidelity)  # type: ignore[arg-type]
            assert sum(cfg.budget) + (3 + 2 if fidelity == "low_to_high" else 0) == 25
            assert [bool(count) for count in cfg.budget] == [stages != "two", stages != "one"]


@pytest.mark.parametrize(("stages", "fidelity"), [("one", "high"), ("two", "low"), ("both", "low_to_high")])
def test_a_variant_evaluates_as_often_as_its_budget_says(stages: str, fidelity: str) -> None:
    method = method_of("pfedgpt", stages=stages, fidelity=fidelity, evaluations=(4, 4), initial=3, clusters=2)
    _, found, update = choice(method, ctx := returning(method, talks()))
    # A finalist that is w = 0 or w = 1 is scored once.
    least = 11 if fidelity == "low_to_high" else 13
    assert ((found.evaluations >= least) & (found.evaluations <= 13)).all()
    [own, *_] = update.rows.of(ctx, [0])
    full = own.high.lengths.sum() * found.evaluations[0]
    assert (found.tokens[0] == full) == (fidelity == "high")


def test_an_end_that_is_no_candidate_is_scored_for_the_gain_and_never_chosen() -> None:
    method = method_of("pfedgpt", ends=False, evaluations=(3, 3), initial=2, fidelity="low_to_high")
    _, found, _ = choice(method, returning(method, talks()))
    assert not (found.shares[:, :, 0] == 0).all(1).any()


def test_changes_that_are_sent_are_means_of_changes_and_as_many_numbers_as_the_parameters() -> None:
    plain, sent = method_of("pfedgpt"), method_of("pfedgpt", delta_global="mean_of_changes")
    sizes = []
    for method in (plain, sent):
        ctx = returning(method, talks())
        before = rows(ctx.params, "local").clone()
        played(method, ctx)
        sizes.append(ctx.params.flat(Scope.SHARED).shape[1])
        assert not torch.equal(rows(ctx.params, "local"), before)
    assert sizes[1] == 2 * sizes[0]
    assert torch.equal(rows(ctx.params, "mean_change"), rows(ctx.params, "change"))


def test_clusters_are_by_how_far_layers_and_their_changes_are_apart() -> None:
    method = method_of("pfedgpt")
    ctx = returning(method, talks())
    update = method.local_update
    assert isinstance(update, MixedStart)
    found = update.memory.distances(ctx, [0, 2], update.pair.second)
    assert found.shape == (2, 4, 4)
    name = "A.model.layers.1.self_attn.v_proj"
    change = ctx.received[f"global_{name}"][2] - ctx.params[f"before_{name}"][2]
    expected = [
        (ctx.params[f"local_{name}"][2] - ctx.received[f"global_{name}"][2]).square().mean(),
        (ctx.params[f"change_{name}"][2] - change).square().mean(),
    ]
    np.testing.assert_allclose(found[1, 3, [0, 2]], torch.stack(expected).detach().numpy())


def test_the_gradient_of_the_weights_is_the_loss_s() -> None:
    method = method_of("mix_gradient")
    ctx = returning(method, talks())
    mixtures, _, update = choice(method, ctx)
    lanes, w = [0, 2], np.full((2, 4), 0.4)
    texts, spread = [own.high for own in update.rows.of(ctx, lanes)], by_group(np.arange(4))
    found = slopes(mixtures, lanes, spread(w), texts)
    for layer in range(4):
        step = np.zeros(4)
        step[layer] = 1e-5
        up, down = (mixtures.losses(lanes, spread(w + sign * step), texts) for sign in (1, -1))
        np.testing.assert_allclose(found[:, layer], (up - down) / 2e-5, rtol=1e-5, atol=1e-9)


def test_a_client_s_own_rows_that_score_mixes_are_not_trained_on() -> None:
    method = method_of("pfedgpt", validation="own_holdout", holdout=0.3)
    ctx = returning(method, talks())
    update = method.local_update
    assert isinstance(update, MixedStart)
    kept = [lane.size for lane in update.rows.trained_on(ctx).lanes]
    held = [len(own.high) for own in update.rows.of(ctx, range(3))]
    assert (kept, held) == ([9, 6, 2], [4, 3, 1])
    assert not method.validation_pool
    one = returning(method, with_prompts(toy_lanes([1])))
    assert [update.rows.trained_on(one).lanes[0].size, len(update.rows.of(one, [0])[0].high)] == [1, 1]


def test_the_pool_s_rows_that_are_most_like_a_client_s_own_score_its_mixes() -> None:
    method = method_of("pfedgpt", sample_weight=0.25)
    ctx, lanes = returning(method, talks()), talks()
    # The pool is a few of its own rows among others.
    own = lanes[0].train.rows(np.arange(3))
    mixed = replace(
        POOL,
        **{
            part: np.concatenate([wide(getattr(POOL, part)), wide(getattr(own, part))])
            for part in ("input_ids", "lengths", "labels", "prompt_length")
        },
    )
    update = method.local_update
    assert isinstance(update, MixedStart)
    alone = replace(ctx, validation=mixed, lanes=(replace(lanes[0], train=own), *lanes[1:]))
    [found] = update.rows.of(alone, [0])
    assert len(found.high) == 4
    assert len(set(map(bytes, found.high.input_ids)) & set(map(bytes, wide(own.input_ids)))) >= 2
    assert 1 <= len(found.low) <= 4


def wide(values: Any) -> Any:
    return np.pad(values, ((0, 0), (0, 16 - values.shape[1]))) if values.ndim == 2 else values


def test_few_rows_are_drawn_anew_each_round_unless_they_are_to_stay() -> None:
    seen = {}
    for redraw in (True, False):
        method = method_of("pfedgpt", redraw_low=redraw, low_share=0.25)
        update = method.local_update
        assert isinstance(update, MixedStart)
        ctx = returning(method, talks())
        drawn_rows = {
            bytes(update.rows.of(replace(ctx, round=round), [0])[0].low.input_ids.tobytes()) for round in range(6)
        }
        seen[redraw] = len(drawn_rows)
    assert seen[False] == 1 < seen[True]


def test_without_a_pool_a_round_says_what_is_missing() -> None:
    method = method_of("pfedgpt")
    with pytest.raises(MethodError, match=r"task\.validation_per_class"):
        played(method, replace(returning(method, talks()), validation=None))


def test_the_final_model_is_what_was_trained_or_one_more_mix() -> None:
    losses = {}
    for final in ("trained", "mixed"):
        method = method_of("pfedgpt", final=final)
        ctx = replace(
            returning(method, talks()), stage="personalise", round=0, fresh=torch.tensor([True, False, False])
        )
        before, got = rows(ctx.params, "local").clone(), ctx.received.row(0)
        made = method.personaliser(ctx)
        after = losses[final] = rows(ctx.params, "local")
        assert torch.equal(after[0], got[: after.shape[1]])
        assert torch.equal(after[1:], before[1:]) == (final == "trained")
        assert made.export is not None
        assert made.export(1, "base")
    assert set(made.metrics) >= {"mix_gain", "mix_weight.q_proj.0"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pfedgpt.evaluations=[3,12]"], r"'pfedgpt.evaluations': the first stage has 3, .* 'pfedgpt.initial' = 5"),
        (["pfedgpt.initial=1"], r"'pfedgpt.initial' = 1 has no room for w = 0 and w = 1"),
        (
            ["pfedgpt.delta_global=mean_of_changes", "privacy.secure_aggregation=secagg"],
            r"'pfedgpt.delta_global' = mean_of_changes .* 'privacy.secure_aggregation' = secagg",
        ),
    ],
    ids=["evaluations", "initial", "secure aggregation"],
)
def test_what_cannot_run_is_refused_before_anything_is_loaded(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose([], ["methods=[base,pfedgpt]", "pfedgpt.validation=own_holdout", *words])


def test_gradients_of_a_mix_that_is_cut_to_a_rank_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'mix_gradient.mix' = product"):
        compose([], ["mix_gradient.mix=product"])


def test_more_clusters_than_layers_are_refused() -> None:
    words = ["methods=[mix_random]", "mix_random.validation=own_holdout", "model.layers=3"]
    check_clusters(compose([], [*words, "mix_random.clusters=3"]))
    with pytest.raises(
        ConfigError, match=r"'mix_random.clusters' = 4: projection query of model=tiny-bert has 3 layers"
    ):
        check_clusters(compose([], [*words, "mix_random.clusters=4"]))
