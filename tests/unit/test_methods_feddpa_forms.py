"""FedDPA's forms T and F: what is trained when, and two LoRA that answer every input with weights of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract_kit import ROUNDS, Bench, private_state_comes_back_and_is_used, resumed_is_uninterrupted
from tiny import run_tiny, talk, tiny
from torch.nn.functional import cosine_similarity
from toy import VOCAB, as_talk, play_rounds, toy_context, toy_examples, toy_lanes, toy_llama, with_prompts

from fedtailor.adapters.lora import AdapterPair
from fedtailor.core.errors import ConfigError
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import DecodingConfig
from fedtailor.evaluation.decoding import Decoding, answer
from fedtailor.evaluation.generation import response_losses
from fedtailor.experiment.stages import named_by
from fedtailor.federated.context import ClientContext, Lane
from fedtailor.federated.method import Personalised
from fedtailor.methods import build_method
from fedtailor.methods.feddpa import ENTRY
from fedtailor.methods.feddpa_config import FedDpaConfig

HOW = {"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "local_rank": 3, "scale": 2.0, "dropout": 0.1}
Prompts = list[list[np.ndarray]]


def lanes_of(sizes: Sequence[int] = (9, 8, 3)) -> list[Lane]:
    return with_prompts(toy_lanes(sizes))


def model(form: str = "t", lanes: Sequence[Lane] | None = None, **how: Any) -> tuple[ClientContext, Personalised]:
    """Clients whose LoRA differ a lot, personalised."""
    lanes = lanes or lanes_of()
    method = build_method("feddpa", HOW | {"form": form} | how, 3)
    ctx = toy_context(toy_llama(), lanes, method.adapter)
    for spec in ctx.params.specs:
        for k, lane in enumerate(lanes):
            whose = "all" if spec.name.startswith("global") else lane.client.id
            with torch.no_grad():
                drawn = numpy_rng("feddpa", spec.name, whose).normal(size=spec.shape)
                ctx.params[spec.name][k] = torch.from_numpy(drawn * 0.3)
    ctx = replace(ctx, stage="personalise", fresh=torch.zeros(len(lanes), dtype=torch.bool))
    return ctx, method.personaliser(ctx)


def prompts(counts: Sequence[int]) -> Prompts:
    rngs = [numpy_rng("feddpa prompts", k) for k in range(len(counts))]
    return [
        [rng.integers(3, VOCAB, rng.integers(1, 12)) for _ in range(n)] for rng, n in zip(rngs, counts, strict=True)
    ]


def pair_of(ctx: ClientContext, form: str = "t") -> AdapterPair:
    adapter = build_method("feddpa", HOW | {"form": form}, 3).adapter
    assert isinstance(adapter, AdapterPair)
    return adapter


@torch.no_grad()
def state(ctx: ClientContext, lane: int, prompt: np.ndarray) -> torch.Tensor:
    """The last layer's state of a prompt's last token under the local LoRA alone, computed for itself."""
    pair_of(ctx).switch(ctx.net, ctx.params, "second")
    ctx.net.state.shapes, ctx.net.state.rows = ((1, len(prompt)),), 1
    with ctx.net.alone(lane):
        found: torch.Tensor = ctx.net.model.base_model(torch.from_numpy(prompt)[None])[0][0, -1]
    return found


def expected_weight(ctx: ClientContext, lane: int, prompt: np.ndarray, instances: int, most: float) -> float:
    own = ctx.lanes[lane]
    rng = numpy_rng(ctx.seed, ctx.stage, ctx.round, own.client.id, "instances")
    picked = rng.choice(own.size, size=min(instances, own.size), replace=False)
    assert own.train.prompt_length is not None
    known = [own.train.input_ids[i, : own.train.prompt_length[i]] for i in picked]
    mine = state(ctx, lane, prompt)
    return most * max(0.0, float(torch.stack([cosine_similarity(mine, state(ctx, lane, x), 0) for x in known]).mean()))


@torch.no_grad()
def token_by_token(ctx: ClientContext, lane: int, prompt: np.ndarray, weight: float, new: int) -> list[int]:
    """Greedy decoding spelt out, with one weight for everything."""
    pair_of(ctx).switch(ctx.net, ctx.params, "both")
    ids = list(map(int, prompt))
    with ctx.net.alone(lane):
        for _ in range(new):
            ctx.net.state.shapes, ctx.net.state.rows = ((1, len(ids)),), 1
            ctx.net.state.blend = torch.full((1, 1), weight, dtype=torch.float64)
            ids.append(int(ctx.net.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def how(new: int = 6, **more: Any) -> Decoding:
    return Decoding(DecodingConfig(max_new_tokens=new, **more), (), 0)


def test_every_row_of_a_batch_is_answered_with_its_own_weight() -> None:
    asked = prompts([4, 2, 5])
    ctx, _ = model(max_weight=1.0)
    found = answer(ctx.net, asked, how())
    weights = [[expected_weight(ctx, k, p, 5, 1.0) for p in lane] for k, lane in enumerate(asked)]
    assert max(map(max, weights)) - min(map(min, weights)) > 0.2, "the inputs differ"
    for k, lane in enumerate(asked):
        assert found[k] == [token_by_token(ctx, k, p, w, 6) for p, w in zip(lane, weights[k], strict=True)]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("instances", [1, 5])
def test_answers_do_not_depend_on_what_is_answered_beside_them(beams: int, instances: int) -> None:
    asked, settings = prompts([4, 1, 3]), how(beams=beams)
    ctx, _ = model(max_weight=1.0, instances=instances)
    together = answer(ctx.net, asked, settings)
    for k, lane in enumerate(asked):
        own, _ = model(max_weight=1.0, instances=instances, lanes=[ctx.lanes[k]])
        assert together[k] == [answer(own.net, [[prompt]], settings)[0][0] for prompt in lane]


def test_rows_that_have_ended_leave_with_their_weights() -> None:
    ctx, _ = model(max_weight=1.0)
    asked = prompts([4, 2, 5])
    long = answer(ctx.net, asked, how(8))
    stops = tuple(sorted({tokens[2] for lane in long for tokens in lane})[:3])
    short = answer(ctx.net, asked, Decoding(DecodingConfig(max_new_tokens=8), stops, 0))
    for tokens, whole in zip((t for lane in short for t in lane), (t for lane in long for t in lane), strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole))
        assert tokens == whole[:end]


@torch.no_grad()
def test_a_response_s_loss_is_with_the_weight_of_its_prompt() -> None:
    ctx, _ = model(max_weight=1.0, instances=2)
    tests = [as_talk(toy_examples(f"{x.client.id}/test", 5), x.client.id) for x in ctx.lanes]
    found = response_losses(ctx.net, tests, 0, 64)
    for k, test in enumerate(tests):
        assert test.prompt_length is not None
        for i, (ids, length, start) in enumerate(zip(test.input_ids, test.lengths, test.prompt_length, strict=True)):
            weight = expected_weight(ctx, k, ids[:start], 2, 1.0)
            pair_of(ctx).switch(ctx.net, ctx.params, "both")
            ctx.net.state.blend = torch.full((1, 1), weight, dtype=torch.float64)
            ctx.net.state.shapes, ctx.net.state.rows = ((1, int(length)),), 1
            with ctx.net.alone(k):
                logits = ctx.net.model(torch.from_numpy(ids[:length])[None]).logits[0]
            own = torch.nn.functional.cross_entropy(logits[start - 1 : -1], torch.from_numpy(ids[start:length]))
            assert found[k][i] == pytest.approx(float(own), rel=1e-9)


@pytest.mark.parametrize("form", ["t", "f"])
def test_at_weight_zero_the_global_lora_alone_answers(form: str) -> None:
    ctx, _ = model(form, max_weight=0.0)
    asked, tests = prompts([3, 2, 4]), [lane.train for lane in ctx.lanes]
    answers, losses = answer(ctx.net, asked, how()), response_losses(ctx.net, tests, 0, 64)
    pair_of(ctx, form).switch(ctx.net, ctx.params, "first")
    assert answers == answer(ctx.net, asked, how())
    for found, expected in zip(losses, response_losses(ctx.net, tests, 0, 64), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    other, _ = model(form, max_weight=1.0)
    assert answer(other.net, asked, how()) != answers


def test_a_client_that_no_round_met_answers_with_the_global_lora() -> None:
    ctx, _ = model(max_weight=1.0)
    ctx = replace(ctx, fresh=torch.tensor([False, True, False]))
    made = build_method("feddpa", HOW | {"form": "t", "max_weight": 1.0}, 3).personaliser(ctx)
    weight = made.metrics["instance_weight"]
    assert weight[1] == 0
    assert (weight[[0, 2]] > 0).all()
    assert made.logits == ctx.net.logits


@pytest.mark.parametrize("form", ["t", "f"])
def test_what_is_sent_is_fedavgs(form: str) -> None:
    plain = {key: value for key, value in HOW.items() if key != "local_rank"}
    fedavg = build_method("fedavg", plain | {"adapter": "lora", "targets": ["query", "value"]}, 3)
    expected, _ = play_rounds(fedavg, 3, net=toy_llama())
    found, private = play_rounds(build_method("feddpa", HOW | {"form": form}, 3), 3, net=toy_llama())
    for own, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(own, wanted)
    assert all(bool(row.size) is (form == "t") for row in private.values())


def test_form_t_trains_the_local_lora_from_the_second_round_on() -> None:
    method = build_method("feddpa", HOW | {"form": "t"}, 3)
    rows = [play_rounds(method, n, net=toy_llama())[1] for n in (1, 2, 3)]
    for client, first in rows[0].items():
        untouched = rows[0]["seen/xx/00"]
        np.testing.assert_array_equal(first, untouched)  # A as drawn, B zero
        assert not np.array_equal(rows[1][client], first)
        assert not np.array_equal(rows[2][client], rows[1][client])


def test_the_local_lora_is_trained_at_its_weight_on_what_was_received() -> None:
    def trained(weight: float, server: float) -> torch.Tensor:
        method = build_method("feddpa", HOW | {"form": "t", "train_weight": weight, "dropout": 0.0}, 3)
        ctx = replace(toy_context(toy_llama(), lanes_of(), method.adapter), round=1)
        for spec in ctx.params.specs:
            drawn = numpy_rng("start", spec.name).normal(size=spec.shape)
            ctx.params.set(spec.name, torch.from_numpy(drawn * (server if spec.name.startswith("global") else 0.1)))
        before = {n: ctx.params[n].detach().clone() for n in pair_of(ctx).second.names(ctx.net)}
        method.local_update(ctx)  # type: ignore[misc]
        return torch.cat([(ctx.params[n] - x).flatten(1) for n, x in before.items()], 1).detach()

    assert not trained(0.0, 0.3).any(), "at weight 0 it has no gradient"
    assert torch.equal(trained(1.0, 0.3), trained(1.0, 0.1)), "at weight 1 there is nothing under it"
    assert not torch.equal(trained(0.5, 0.3), trained(0.5, 0.1))


def test_form_f_trains_the_global_lora_on_for_every_client() -> None:
    whole = {"batch_size": 9, "dropout": 0.0}
    ctx, made = model("f", **whole)
    plain = {key: value for key, value in (HOW | whole).items() if key != "local_rank"}
    fedavg = build_method("fedavg", plain | {"adapter": "lora", "targets": ["query", "value"]}, 3)
    own = toy_context(toy_llama(), lanes_of(), fedavg.adapter)
    for spec in own.params.specs:
        own.params.set(spec.name, ctx.params[spec.name.replace("lora", "global")].detach())
    report = fedavg.local_update(own)  # type: ignore[misc]
    for spec in own.params.specs:
        torch.testing.assert_close(
            ctx.params[spec.name.replace("lora", "local")], own.params[spec.name], rtol=1e-6, atol=1e-9
        )
    torch.testing.assert_close(made.metrics["train_loss"], report.metrics["train_loss"])


def test_a_run_at_weight_zero_scores_as_fedavg_does(tmp_path: Path) -> None:
    how = {"lr": 5e-3, "rank": 2, "scale": 2.0, "targets": "[query,value]", "batch_size": 16, "epochs": 1}
    same = [f"{name}.{key}={value}" for name in ("fedavg", "feddpa") for key, value in how.items()]
    own = ("fedavg.adapter=lora", "feddpa.local_rank=2", "feddpa.dropout=0", "feddpa.max_weight=0")
    few = ("base=none", "methods=[fedavg,feddpa]", "budgets=[2]", "task.languages=[eng,swa]", "strategy.cohort=2")
    for form in ("t", "f"):
        frame = run_tiny(talk(tmp_path, *few, *same, *own, f"feddpa.form={form}"), form).metrics("personalise")
        scores = frame[frame.metric.isin(["loss", "rougeL", "meteor", "exact_match"])]
        table = scores.pivot_table(index=["client", "language", "metric"], columns="method", values="value")
        assert len(table) >= 16
        np.testing.assert_allclose(table["feddpa"], table["fedavg"], rtol=1e-5)
        assert (frame[frame.metric == "instance_weight"].value == 0).all()


@pytest.mark.parametrize("form", ["t", "f"])
def test_a_form_keeps_the_contract_on_instructions(tmp_path: Path, form: str) -> None:
    tiny_form = {"lr": 5e-3, "batch_size": 8, "epochs": 1, "rank": 2, "local_rank": 2, "form": form, "scale": 2.0}
    few = ("base=none", "methods=[base]", "task.languages=[eng,swa]", f"strategy.rounds={ROUNDS}", "budgets=[1,2]")
    bench = Bench.make(tmp_path, talk(tmp_path, *few))
    resumed_is_uninterrupted(replace(ENTRY, tiny=tiny_form), bench)
    private_state_comes_back_and_is_used(replace(ENTRY, tiny=tiny_form), bench)


def test_lanes_side_by_side_have_the_weights_of_lanes_alone() -> None:
    for form in ("t", "f"):
        _, together = model(form)
        for k, lane in enumerate(lanes_of()):
            _, alone = model(form, lanes=[lane])
            for name, values in together.metrics.items():
                torch.testing.assert_close(values[k], alone.metrics[name][0], rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("feddpa.form=t", "feddpa.local_rank=0"), r"'feddpa.local_rank' = 0: form=t needs a local LoRA"),
        (("feddpa.form=f", "feddpa.local_rank=4"), r"'feddpa.local_rank' = 4: .* of rank 8 \(allowed: 8\)"),
        (("feddpa.form=t", "base=feddpa"), r"'feddpa.form' = t weighs its two parts .*base.name=feddpa: sum"),
    ],
    ids=["no-local", "rank", "base"],
)
def test_what_a_form_cannot_be_is_said_at_once(tmp_path: Path, asked: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        talk(tmp_path, "methods=[feddpa]", *asked)


def test_forms_that_weigh_prompts_need_a_task_with_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'feddpa.form' = f weighs prompts, and task '\w+' \(classification\)"):
        tiny(tmp_path, "methods=[feddpa]", "feddpa.form=f")


def test_fedp2efts_form_keeps_the_names_of_its_artifacts() -> None:
    assert set(named_by(FedDpaConfig())) == {
        "targets", "rank", "local_rank", "scale", "dropout", "lr", "epochs", "batch_size", "server_lr",
    }  # fmt: skip
    assert "form" in named_by(FedDpaConfig(form="t"))
