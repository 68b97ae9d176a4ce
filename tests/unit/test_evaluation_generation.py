"""Scores of instructions: each sample counts once, for its own group, whoever it is scored beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import run_tiny, talk
from toy import as_talk, toy_context, toy_examples, toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.core.errors import CapabilityError, ClientError
from fedtailor.core.settings import DecodingConfig
from fedtailor.evaluation import generation
from fedtailor.evaluation.decoding import Decoding, answer
from fedtailor.evaluation.generation import METRICS, Asked, loss_tallies, response_losses, score
from fedtailor.federated.method import Capability, Personalised
from fedtailor.lanes.batches import Examples, make_batch
from fedtailor.lanes.features import client_features, counts_output, feature_size
from fedtailor.methods import METHODS, build_method
from fedtailor.methods.fedp2eft import FedP2EFTConfig, PsgConfig, StrategyGenerator
from fedtailor.storage.digest import digest
from fedtailor.storage.round_store import PREDICTIONS
from fedtailor.storage.run_folder import RunFolder

GROUPS = ("en", "te", "zh", "ar")
HOW = Decoding(DecodingConfig(max_new_tokens=5), (2,), 0)
ANSWERING = [name for name in METHODS if Capability.CLASSES not in build_method(name, {}, 2).requires]
QUICK: dict[str, dict[str, Any]] = {
    "fedavg": {"adapter": "lora"},
    "lora": {"lr": 5e-2, "batch_size": 4},
    "adalora": {"lr": 5e-2, "batch_size": 4},
    "bayestune_lora": {
        "search": {"lr": 5e-2, "epochs": 1, "batch_size": 4},
        "finetune": {"lr": 5e-2, "epochs": 1, "batch_size": 4},
    },
    "fedp2eft": {"finetune": {"lr": 5e-2, "epochs": 1, "batch_size": 4, "scale": 9e3}},
    "fedl2p": {"finetune": {"lr": 5e-2, "epochs": 1, "batch_size": 4}},
}


class Words:
    """A tokenizer whose tokens are words."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(f"w{token}" for token in ids)


def examples_for(counts: Sequence[int]) -> list[Examples]:
    return [as_talk(toy_examples(f"test{k}", n), f"test{k}") for k, n in enumerate(counts)]


def asked_of(tests: Sequence[Examples]) -> list[Asked]:
    return [Asked(t, [[f"w{row} w7"] for row in range(len(t.labels))]) for t in tests]


def prompts_of(examples: Examples) -> list[np.ndarray]:
    assert examples.prompt_length is not None
    return [row[:n] for row, n in zip(examples.input_ids, examples.prompt_length, strict=True)]


def scored(net: Any, asked: Sequence[Asked], budget: int = 300, how: Decoding = HOW) -> list[generation.Answered]:
    return score(net, net.logits, asked, GROUPS, Words(), how, budget)  # type: ignore[arg-type]


def test_the_loss_of_a_sample_is_the_mean_over_its_own_response() -> None:
    net = toy_llama()
    net.state.shapes = ((1, 1),)
    [examples] = examples_for([6])
    [found] = response_losses(net, [examples], 0, 40)
    for row, (prompt, length) in enumerate(zip(examples.prompt_length, examples.lengths, strict=True)):  # type: ignore[arg-type]
        ids = torch.from_numpy(examples.input_ids[row, :length])
        said = net.model(input_ids=ids.unsqueeze(0)).logits[0].log_softmax(-1)
        own = [-float(said[i - 1, ids[i]].detach()) for i in range(prompt, length)]
        assert found[row] == pytest.approx(np.mean(own))


def test_losses_do_not_depend_on_the_batch_nor_on_other_lanes() -> None:
    tests, net = examples_for([9, 2, 5]), toy_llama()
    whole = response_losses(net, tests, 0, 10_000)
    for budget in (1, 60):
        for one, other in zip(whole, response_losses(net, tests, 0, budget), strict=True):
            np.testing.assert_allclose(other, one, rtol=1e-9)
    for lane, examples in enumerate(tests):
        np.testing.assert_allclose(response_losses(net, [examples], 0, 60)[0], whole[lane], rtol=1e-9)


def test_every_sample_counts_once_for_its_own_group() -> None:
    tests = examples_for([9, 2, 5])
    for examples, one in zip(tests, scored(toy_llama(), asked_of(tests)), strict=True):
        counts = {
            GROUPS[label]: int(n) for label, n in zip(*np.unique(examples.labels, return_counts=True), strict=True)
        }
        assert list(one.tally) == [group for group in GROUPS if group in counts]
        assert all(set(metrics) == {*METRICS, "loss"} for metrics in one.tally.values())
        assert {g: m.count for g, metrics in one.tally.items() for m in metrics.values()} == counts


def test_a_groups_numbers_are_means_over_its_samples() -> None:
    [examples], net = examples_for([9]), toy_llama()
    [asked] = asked_of([examples])
    [one] = scored(net, [asked])
    [losses] = response_losses(net, [examples], 0, 300)
    for label in set(examples.labels.tolist()):
        mine = np.flatnonzero(examples.labels == label)
        values = [generation.measures(one.answers[i], asked.references[i]) for i in mine]
        found = one.tally[GROUPS[label]]
        assert found["loss"].value == pytest.approx(losses[mine].mean())
        for metric in METRICS:
            assert found[metric].value == pytest.approx(np.mean([v[metric] for v in values]))


def test_answers_are_the_models_own_and_a_right_one_is_seen() -> None:
    [examples], net = examples_for([6]), toy_llama()
    tokens = answer(net, [prompts_of(examples)], HOW)[0]
    texts = [" ".join(f"w{token}" for token in own) for own in tokens]
    asked = Asked(examples, [[texts[0]], *[["never this"]] * 5])
    [one] = scored(net, [asked])
    assert list(one.answers) == texts
    exact = {group: metrics["exact_match"] for group, metrics in one.tally.items()}
    assert sum(m.total for m in exact.values()) == 1.0
    assert exact[GROUPS[int(examples.labels[0])]].total == 1.0


def test_lanes_scored_together_are_lanes_scored_alone() -> None:
    tests, net = examples_for([9, 2, 5]), toy_llama()
    together = scored(net, asked_of(tests))
    for examples, one in zip(tests, together, strict=True):
        [alone] = scored(net, asked_of([examples]), budget=31)
        assert alone.answers == one.answers
        for group, metrics in one.tally.items():
            for name, m in metrics.items():
                assert alone.tally[group][name].value == pytest.approx(m.value, rel=1e-9)


def test_only_the_first_examples_are_answered_where_a_limit_is_set() -> None:
    [examples] = examples_for([9])
    few = examples.rows(slice(4))
    assert (len(few.labels), len(few.lengths), len(few.prompt_length), len(few.input_ids)) == (4, 4, 4, 4)  # type: ignore[arg-type]
    assert (
        examples.rows(slice(20)).labels.tolist()
        == examples.rows(slice(None)).labels.tolist()
        == examples.labels.tolist()
    )


def test_a_method_that_answers_without_the_model_is_refused() -> None:
    net = toy_llama()
    with pytest.raises(CapabilityError, match="cannot be asked for text"):
        score(net, lambda batch: net.logits(batch), asked_of(examples_for([2])), GROUPS, Words(), HOW, 300)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ANSWERING)
def test_every_methods_answers_are_what_its_logits_say(method: str) -> None:
    """What is generated after personalising is, token by token, the class of the highest score of `made.logits`."""
    built, net = build_method(method, QUICK.get(method, {}), 2), toy_llama()
    lanes = with_prompts(toy_lanes([8, 6]))
    ctx = toy_context(net, lanes, built.adapter, built.modules, budgets=(1, 2), r_max=2)
    made: Personalised = built.personaliser(ctx)
    net.train_mode(False)
    assert made.logits == net.logits
    asked = [prompts_of(lane.train) for lane in made.lanes]  # type: ignore[arg-type]
    found = answer(net, asked, replace(HOW, stop_ids=()))
    talks = []
    for prompts, answers in zip(asked, found, strict=True):
        rows = [np.array([*p, *a]) for p, a in zip(prompts, answers, strict=True)]
        ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        lengths = np.array([len(row) for row in rows])
        talks.append(Examples(ids, lengths, lengths * 0, prompt_length=np.array([len(p) for p in prompts])))
    batch = make_batch(talks, [np.arange(len(t.labels)) for t in talks], 0)
    with torch.no_grad():
        said = made.logits(batch).float().argmax(-1)
    assert (said == batch.labels)[batch.valid].all()


def test_features_read_prompts_and_not_a_token_of_the_responses() -> None:
    net = toy_llama()
    [lane] = with_prompts(toy_lanes([7]))
    e: Any = lane.train
    features = client_features(net, e, 0)
    other = e.input_ids.copy()
    for row, (prompt, length) in enumerate(zip(e.prompt_length, e.lengths, strict=True)):
        other[row, prompt:length] = 99
    changed = Examples(other, e.lengths, e.labels, prompt_length=e.prompt_length)
    for pad_to in (None, 20):
        same = (client_features(net, x, 0, pad_to) for x in (e, changed))
        torch.testing.assert_close(*same, rtol=0, atol=0)
    prompts = Examples(e.input_ids, e.prompt_length, e.labels, prompt_length=e.prompt_length)
    torch.testing.assert_close(client_features(net, prompts, 0), features, rtol=0, atol=0)
    assert not torch.allclose(
        client_features(net, Examples(e.input_ids, e.lengths, e.labels, prompt_length=e.lengths), 0), features
    )


def test_features_are_moments_over_all_tokens_of_the_prompts() -> None:
    net = toy_llama()
    [lane] = with_prompts(toy_lanes([5]))
    e: Any = lane.train
    seen: list[list[torch.Tensor]] = [[], []]
    modules = (net.layers[3], net.model.lm_head)
    hooks = [
        m.register_forward_pre_hook(lambda _m, x, s=s: s.append(x[0].detach()))
        for m, s in zip(modules, seen, strict=True)
    ]
    for row, prompt in enumerate(e.prompt_length):
        net.state.shapes = ((1, int(prompt)),)
        net.model(input_ids=torch.from_numpy(e.input_ids[row : row + 1, :prompt]))
    for hook in hooks:
        hook.remove()
    features = client_features(net, e, 0)
    for place, inputs in ((3, seen[0]), (len(net.adapted), seen[1])):
        values = torch.cat([x.flatten() for x in inputs])
        assert float(features[2 * place]) == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-7)
        assert float(features[2 * place + 1]) == pytest.approx(float(values.std()), rel=1e-5)


def test_features_score_no_token_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    net = toy_llama()

    def refuse(*_: object) -> None:
        raise AssertionError("the output embedding was asked")

    monkeypatch.setattr(net.model.lm_head, "forward", refuse)
    [lane] = with_prompts(toy_lanes([5]))
    assert client_features(net, lane.train, 0).shape == (feature_size(net),) == (2 * (14 + 1),)


def test_the_output_embeddings_input_is_a_feature_only_where_it_is_asked_for() -> None:
    net = toy_llama()
    ctx = toy_context(net, with_prompts(toy_lanes([5, 4])))
    both = torch.stack([client_features(net, lane.train, 0) for lane in ctx.lanes])
    torch.testing.assert_close(ctx.client_features(None).float(), both[:, :28])
    torch.testing.assert_close(ctx.client_features(None, count_output=True).float(), both)
    classifier = toy_context(toy_net(), toy_lanes([5]))
    assert not counts_output(classifier.net)
    shapes = {classifier.client_features(None, count_output=on).shape for on in (True, False)}
    assert shapes == {(1, 28)}


@pytest.mark.parametrize(("count", "widths"), [(False, (392, 784, 6272)), (True, (394, 788, 6272))])
def test_the_generators_widths_for_llama_3b_are_the_papers_or_the_references(
    count: bool, widths: tuple[int, int, int]
) -> None:
    net: Any = SimpleNamespace(adapted=range(196), model=SimpleNamespace(get_output_embeddings=lambda: "lm_head"))
    shapes = {s.name: s.shape for s in StrategyGenerator(32, PsgConfig(count_output=count)).specs(net)}
    assert (shapes["psg.hidden.weight"][::-1], shapes["psg.out.weight"]) == (widths[:2], (widths[2], widths[1]))


def test_the_reference_counts_the_output_embedding() -> None:
    assert FedP2EFTConfig.model_validate({"reference": True}).psg.count_output
    assert not FedP2EFTConfig.model_validate({"reference": True, "psg": {"count_output": False}}).psg.count_output
    assert not FedP2EFTConfig().psg.count_output


def test_fedp2eft_trains_with_the_further_pair() -> None:
    method = build_method("fedp2eft", {"psg": {"count_output": True}}, 2)
    ctx = toy_context(toy_llama(), with_prompts(toy_lanes([6, 5])), method.adapter, method.modules)
    assert ctx.params["psg.hidden.weight"].shape == (2, 60, 30)
    assert torch.isfinite(method.local_update(ctx).metrics["psg_loss"]).all()


def test_losses_alone_are_those_of_the_scores() -> None:
    tests, net = examples_for([7]), toy_llama()
    [tally] = loss_tallies(net, tests, GROUPS, 0, 300)
    [one] = scored(net, asked_of(tests))
    assert {g: m["loss"] for g, m in tally.items()} == {g: m["loss"] for g, m in one.tally.items()}


SMALL = ("methods=[base,lora]", "budgets=[1]", "base.rounds=1", "personalise.pools=[seen]")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    more = ("personalise.save_predictions=true", "personalise.score_train=true")
    return run_tiny(talk(tmp_path_factory.mktemp("kept"), *SMALL, *more))


def answers_of(run: RunFolder, method: str) -> list[dict[str, Any]]:
    [stage] = [s for s in run.stages("personalise") if s["method"] == method]
    return [row for commit in run.log(stage).all() for row in commit.table(PREDICTIONS).to_pylist()]


def test_answers_are_kept_in_order_with_question_and_reference(kept: RunFolder) -> None:
    rows = answers_of(kept, "lora")
    assert [row["row"] for row in rows] == [0, 1, 2, 3] * 6
    assert len({row["client"] for row in rows}) == 6
    assert {(row["method"], row["budget"]) for row in rows} == {("lora", 1)}
    assert all(row["prompt"] and row["reference"] for row in rows)
    clients = [row["client"] for row in rows[::4]]
    assert clients == list(dict.fromkeys(row["client"] for row in answers_of(kept, "base")))


def test_scores_can_be_computed_again_from_the_answers_kept(kept: RunFolder) -> None:
    rows, frame = answers_of(kept, "lora"), kept.metrics()
    for client in {row["client"] for row in rows}:
        mine = [row for row in rows if row["client"] == client]
        for language in {row["language"] for row in mine}:
            values = [
                generation.measures(row["prediction"], [row["reference"]])["rougeL"]
                for row in mine
                if row["language"] == language
            ]
            [found] = frame[
                (frame.method == "lora")
                & (frame.client == client)
                & (frame.language == language)
                & (frame.metric == "rougeL")
            ].itertuples()
            assert (found.value, found.weight) == (pytest.approx(np.mean(values)), len(values))


def test_of_training_examples_the_loss_alone_is_scored(kept: RunFolder) -> None:
    frame = kept.metrics()
    trained = frame[frame.metric.str.startswith("train_") & (frame.stage == "personalise") & (frame.method == "base")]
    assert set(trained.metric) == {"train_loss_after"}
    assert (trained.weight > 0).all()
    assert np.isfinite(trained.value).all()


def test_keeping_answers_does_not_change_a_runs_digest(kept: RunFolder, tmp_path: Path) -> None:
    plain = run_tiny(talk(tmp_path, *SMALL, "personalise.score_train=true"))
    assert digest(plain.storage, plain.run_id) == digest(kept.storage, kept.run_id)


def test_a_client_whose_loss_is_no_number_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        generation, "response_losses", lambda _l, texts, *_: [np.full(len(t.labels), np.nan) for t in texts]
    )
    with pytest.raises(ClientError, match="test loss is nan"):
        run_tiny(talk(tmp_path, *SMALL, "methods=[base]"))
