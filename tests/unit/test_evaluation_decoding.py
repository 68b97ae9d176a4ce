"""Answers are what the model says token by token, whoever is decoded beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from toy import VOCAB, toy_context, toy_lanes, toy_llama, with_prompts
from transformers import GenerationConfig

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import DecodingConfig
from fedtailor.evaluation import greedy
from fedtailor.evaluation.decoding import Decoding, answer, answer_all
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.layers import LaneEmbedding, narrowed
from fedtailor.lanes.net import LaneNet
from fedtailor.models.families import positions_of

STOP = 2
Prompts = list[list[np.ndarray]]


def how(new: int = 8, stop: tuple[int, ...] = (STOP,), positions: int | None = None, **more: object) -> Decoding:
    cfg = DecodingConfig(max_new_tokens=new, **more)  # type: ignore[arg-type]
    return Decoding(cfg, stop, 0, positions)


def prompts(counts: Sequence[int], longest: int = 12) -> Prompts:
    made = []
    for lane, count in enumerate(counts):
        rng = numpy_rng("prompts", str(lane))
        made.append([rng.integers(3, VOCAB, rng.integers(1, longest + 1)) for _ in range(count)])
    return made


def adapted(lanes: int, net: LaneNet | None = None) -> tuple[LaneNet, ClientContext]:
    """A model whose lanes differ a lot."""
    net = net or toy_llama()
    ctx = toy_context(net, with_prompts(toy_lanes([5] * lanes)), LoraAdapter(2, 2.0, Scope.SHARED))
    for spec in ctx.params.specs:
        drawn = numpy_rng("adapter", spec.name).normal(size=(9, *spec.shape))[:lanes]
        ctx.params.set(spec.name, torch.from_numpy(drawn * 0.5))
    return net, ctx


def only(ctx: ClientContext, lane: int) -> LaneNet:
    """One lane's model in a net of its own."""
    net, own = adapted(1)
    for spec in ctx.params.specs:
        own.params.set(spec.name, ctx.params[spec.name][lane].detach())
    return net


@torch.no_grad()
def token_by_token(net: LaneNet, prompt: np.ndarray, new: int, stop: tuple[int, ...] = (STOP,)) -> list[int]:
    """Greedy decoding spelt out: the whole text again for every token, no cache, no padding."""
    ids = list(map(int, prompt))
    for _ in range(new):
        net.state.shapes, net.state.rows = ((1, len(ids)),), 1
        token = int(net.model(input_ids=torch.tensor([ids])).logits[0, -1].float().argmax())
        if token in stop:
            break
        ids.append(token)
    return ids[len(prompt) :]


@pytest.mark.parametrize("adapters", [False, True])
def test_greedy_is_the_likeliest_token_again_and_again(adapters: bool) -> None:
    net, ctx = adapted(3)
    asked = prompts([4, 2, 5])
    if not adapters:
        net.unbind()
    found = answer(net, asked, how(8))
    for k, lane in enumerate(asked):
        alone = only(ctx, k) if adapters else net
        assert found[k] == [token_by_token(alone, prompt, 8) for prompt in lane]
    assert len({tuple(tokens) for lane in found for tokens in lane}) > 6  # nothing degenerate


def test_a_stop_token_ends_an_answer_and_is_not_part_of_it() -> None:
    net = toy_llama()
    [[tokens]] = answer(net, [[np.array([5, 6, 7])]], how(8, stop=()))
    assert len(tokens) == 8
    for place in (0, 3):
        first = tokens.index(tokens[place])
        assert answer(net, [[np.array([5, 6, 7])]], how(8, stop=(VOCAB - 1, tokens[place])))[0][0] == tokens[:first]


def test_a_closing_of_several_tokens_is_no_part_of_an_answer() -> None:
    settings = Decoding(DecodingConfig(), (2, 9), 0, closing=(7, 8, 9))
    assert settings.bare([5, 7, 8, 9, 4]) == [5]
    assert settings.bare([5, 8, 9]) == [5, 8]
    assert settings.bare([5, 7, 8, 2, 9]) == [5, 7, 8]
    assert settings.bare([8, 9]) == [8]
    assert settings.bare([7, 8, 9]) == settings.bare([2]) == []
    assert settings.bare([5, 7, 8]) == [5, 7, 8]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rules", [{}, {"no_repeat_ngram": 2, "repetition_penalty": 1.7}])
def test_lanes_side_by_side_answer_like_lanes_alone(beams: int, rules: dict[str, object]) -> None:
    net, ctx = adapted(3)
    asked, settings = prompts([3, 1, 4]), how(6, beams=beams, **rules)
    together = answer(net, asked, settings)
    for k, lane in enumerate(asked):
        assert together[k] == answer(only(ctx, k), [lane], settings)[0]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("rules", [{}, {"no_repeat_ngram": 2, "repetition_penalty": 1.7}])
def test_a_prompt_is_answered_alike_in_any_batch(beams: int, rules: dict[str, object]) -> None:
    net, _ = adapted(1)
    [asked], settings = prompts([7]), how(6, beams=beams, **rules)
    one_by_one = [answer(net, [[prompt]], settings)[0][0] for prompt in asked]
    for budget in (1, 60, 10_000):
        assert answer_all(net, [asked], settings, budget) == [one_by_one]


def test_padding_on_the_left_changes_nothing() -> None:
    net, _ = adapted(1)
    short, long = np.array([9, 8, 7]), np.arange(3, 33)
    alone = answer(net, [[short]], how(6))[0][0]
    assert answer(net, [[short, long]], how(6))[0][0] == alone
    penal = how(6, repetition_penalty=2.0)
    assert answer(net, [[short, long, long]], penal)[0][0] == answer(net, [[short]], penal)[0][0]


@pytest.mark.parametrize("beams", [1, 3])
def test_rules_against_repetition_do_not_count_padding(beams: int) -> None:
    net, _ = adapted(1)
    short, long = np.array([9, 8, 7]), np.arange(3, 33)
    for rule in ({"repetition_penalty": 1.3}, {"no_repeat_ngram": 1}):
        settings = how(6, beams=beams, **rule)
        alone = answer(net, [[short]], settings)[0][0]
        # As where the padding token is the unknown or the end token: one that the model would say.
        assert answer(net, [[short, long]], replace(settings, pad_id=alone[0]))[0][0] == alone


def test_rules_against_repetition_hold() -> None:
    net, _ = adapted(1)
    [asked] = prompts([6])
    pairs_seen = 0
    for prompt, tokens in zip(asked, answer(net, [asked], how(12, no_repeat_ngram=2))[0], strict=True):
        text = [*map(int, prompt), *tokens]
        pairs = list(pairwise(text))
        new = pairs[len(prompt) - 1 :]
        pairs_seen += len(new)
        assert all(pair not in pairs[: len(prompt) - 1 + i] for i, pair in enumerate(new))
    assert pairs_seen > 20
    free, held = (answer(net, [asked], how(12, **rule))[0] for rule in ({}, {"repetition_penalty": 50.0}))
    assert free != held
    assert all(len(set(tokens)) == len(tokens) for tokens in held)


@torch.no_grad()
def log_probability(net: LaneNet, prompt: np.ndarray, tokens: Sequence[int]) -> float:
    """Of an answer with its stop token, if it has one, per token."""
    ids = torch.tensor([[*map(int, prompt), *tokens]])
    net.state.shapes, net.state.rows = ((1, ids.shape[1]),), 1
    scores = net.model(input_ids=ids).logits[0].double().log_softmax(-1)
    places = range(len(prompt) - 1, ids.shape[1] - 1)
    return float(sum(scores[i, ids[0, i + 1]] for i in places)) / len(tokens)


def test_a_length_penalty_prefers_longer_or_shorter_answers() -> None:
    net, _ = adapted(1)
    [asked], many = prompts([8]), tuple(range(3, 3 + VOCAB // 4))
    short, plain, long = (
        [len(tokens) for tokens in answer(net, [asked], how(8, stop=many, beams=6, length_penalty=power))[0]]
        for power in (-6.0, 0.0, 6.0)
    )
    assert sum(short) < sum(long)
    assert sum(short) <= sum(plain) <= sum(long)
    greedy = [answer(net, [asked], how(8, stop=many, length_penalty=power)) for power in (-6.0, 6.0)]
    assert greedy[0] == greedy[1]


def test_beams_find_likelier_answers_than_greed() -> None:
    net, _ = adapted(1)
    [asked] = prompts([8])
    greedy, wide = (answer(net, [asked], how(4, stop=(), beams=b))[0] for b in (1, 6))
    gains = [
        log_probability(net, p, w) - log_probability(net, p, g) for p, g, w in zip(asked, greedy, wide, strict=True)
    ]
    assert max(gains) > 0.01
    assert sum(gains) > 0


@pytest.mark.parametrize("beams", [1, 3])
def test_no_answer_goes_beyond_what_the_model_can_position(beams: int) -> None:
    net, _ = adapted(1)
    assert positions_of(net.config) == 64
    asked = [np.array([9, 8, 7]), *(np.arange(first, first + 30) for first in range(3, 13))]
    settings = how(10, stop=(), positions=34, beams=beams)
    [together] = answer(net, [asked], settings)
    # The short prompt keeps its ten tokens, and each gets what it gets alone: also the best beam of four tokens.
    assert [len(tokens) for tokens in together] == [10] + [4] * 10
    assert together == [answer(net, [[prompt]], settings)[0][0] for prompt in asked]


def test_a_folders_own_generation_settings_do_not_count() -> None:
    net, _ = adapted(1)
    [asked] = prompts([3])
    plain = answer(net, [asked], how(6))
    theirs = GenerationConfig(do_sample=True, temperature=9.0, repetition_penalty=30.0, suppress_tokens=[5, 6, 7])
    net.model.generation_config = theirs
    assert answer(net, [asked], how(6)) == plain
    assert net.model.generation_config is theirs


def test_every_lane_reads_its_clients_own_embeddings_under_beams() -> None:
    net = toy_llama()
    body = net.model.model
    body.embed_tokens = LaneEmbedding(body.embed_tokens, net.state)
    tables = torch.from_numpy(numpy_rng("tables").normal(size=(2, VOCAB, 16)) * 0.3)
    body.embed_tokens.tables = tables
    asked = prompts([3, 2])
    net.state.overlay_rows = torch.tensor([0, 1])
    together = answer(net, asked, how(6, beams=2))
    for k in (0, 1):
        net.state.overlay_rows = torch.tensor([k])
        assert answer(net, [asked[k]], how(6, beams=2))[0] == together[k]
    assert together[0][:2] != together[1]


def test_calls_stay_within_the_token_budget_and_go_from_long_to_short(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = adapted(2)
    asked = prompts([9, 4])
    seen = []
    generate = net.model.generate

    def counting(ids: torch.Tensor, **more: object) -> torch.Tensor:
        seen.append(tuple(ids.shape))
        return generate(ids, **more)

    monkeypatch.setattr(net.model, "generate", counting)
    answer_all(net, asked, how(4, beams=2), 120)
    assert all(rows * (width + 4) * 2 <= 120 or rows == 2 for rows, width in seen)
    assert [width for _, width in seen] == sorted((width for _, width in seen), reverse=True)
    assert 1 < len(seen) < 9


def test_decoding_leaves_a_model_that_recomputes_activations_alone() -> None:
    plain, _ = adapted(1)
    saving, _ = adapted(1, toy_llama(checkpointing=True))
    asked = prompts([3])
    saving.train_mode(False)
    assert answer(saving, asked, how(6)) == answer(plain, asked, how(6))


def shapes_read(net: LaneNet, asked: Prompts, settings: Decoding) -> tuple[list[tuple[int, int]], list[list[int]]]:
    """What the model is given, call by call, (rows, tokens), and the first lane's answers."""
    seen: list[tuple[int, int]] = []

    def note(_module: object, _args: object, given: dict[str, torch.Tensor]) -> None:
        seen.append(tuple(given["input_ids"].shape))  # type: ignore[arg-type]

    handle = net.model.register_forward_pre_hook(note, with_kwargs=True)
    answers = answer(net, asked, settings)[0]
    handle.remove()
    return seen, answers


def test_rows_that_have_ended_leave() -> None:
    net, _ = adapted(2)
    long = [np.arange(first, first + 30) for first in range(3, 8)]
    first = [long[0], np.array([9, 8, 7]), *long[1:]]
    seen, answers = shapes_read(net, [first, long], how(10, stop=(), positions=34, repetition_penalty=1.3))
    # The row that only fills the second lane up ends at once; after four tokens a row of each lane goes on.
    assert seen == [(12, 30), *[(12, 1)] * 3, *[(2, 1)] * 6]
    assert [len(tokens) for tokens in answers] == [4, 10, 4, 4, 4, 4]
    settings = how(10, stop=(), positions=34, repetition_penalty=1.3)
    assert answers == answer(net, [first, first], settings)[0]
    assert answers[1] == answer(net, [first[1:2], long[:1]], settings)[0][0]


def test_prompts_of_about_equal_length_are_read_together(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = adapted(2)
    asked = [[np.arange(3, 3 + n) for n in lengths] for lengths in ((30, 28, 4), (29, 3, 3))]
    whole, expected = shapes_read(net, asked, how(4))
    assert whole[0] == (6, 30)
    monkeypatch.setattr(greedy, "part_tokens", lambda net: 10.0)
    parts, found = shapes_read(net, asked, how(4))
    assert parts[:2] == [(4, 30), (2, 4)]
    assert found == expected


def test_adapters_are_cast_once_and_are_what_they_were_afterwards() -> None:
    net, _ = adapted(2, toy_llama(torch.float32, compute="bfloat16"))
    layer = net.layers[0]
    layer.lam = torch.full((2, 2), 0.5)
    before = dict(vars(layer))
    types = set()
    handle = layer.register_forward_pre_hook(lambda *_: types.add((layer.a.dtype, layer.b.dtype, layer.lam)))  # type: ignore[union-attr]
    told = answer(net, prompts([3, 2]), how(6))
    handle.remove()
    assert types == {(torch.bfloat16, torch.bfloat16, None)}
    assert all(vars(layer)[name] is before[name] for name in ("a", "b", "lam", "under", "overlay", "own"))
    assert any(tokens for lane in told for tokens in lane)
    with narrowed(net.layers, torch.bfloat16), torch.no_grad():
        assert layer.b is not None
        torch.testing.assert_close(layer.b, (before["b"] * 0.5).bfloat16(), rtol=0, atol=0)
