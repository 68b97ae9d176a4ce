"""Presets of pFedGPT: its data, prompt, decoding and LoRA for every method, and what Alpaca-7B needs."""

from __future__ import annotations

import pytest
from instruction_cases import byte_tokenizer

from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import method_of, method_section, seen_clients
from fedtailor.experiment.plan import Plan, make_plan
from fedtailor.methods import METHODS
from fedtailor.models.dimensions import dimensions
from fedtailor.tasks.prompts import TextTemplate, template_for

PRESETS = {"pfedgpt_dolly": 1.5e-4, "pfedgpt_flan1": 3e-4, "pfedgpt_flan2": 3e-4, "pfedgpt_alpaca7b": 1.5e-4}
"""With the rate of their tables."""
SIGMA = 32 * 2 * 2 * 8 * 4096


@pytest.mark.parametrize("name", PRESETS)
def test_every_method_has_the_papers_lora_rate_and_epoch(name: str) -> None:
    exp = compose([name], [])
    assert (exp.strategy.rounds, exp.strategy.cohort, exp.budgets, exp.base.name) == (20, "all", (8,), "none")
    assert exp.task.validation_per_class == 40
    own = {method: method_section(exp, method).model_dump() for method in exp.methods if method != "base"}
    assert {method: section["lr"] for method, section in own.items()} == dict.fromkeys(own, PRESETS[name])
    assert {method: section["epochs"] for method, section in own.items()} == dict.fromkeys(own, 1) | {"lora": 20}
    assert all(section["scale"] == 2 and section["dropout"] == 0.05 for section in own.values())
    assert all(section["batch_size"] == 32 and section.get("rank", 8) == 8 for section in own.values())
    assert all(section.get("targets", ("query", "value")) == ("query", "value") for section in own.values())
    pooled = [method for method in exp.methods if method_of(exp, method).validation_pool]
    assert pooled == ["mix_grid", "mix_random", "pfedgpt"]


@pytest.mark.parametrize("name", PRESETS)
def test_prompt_length_and_decoding_are_those_of_its_code(name: str) -> None:
    exp, how = compose([name], []), compose([name], []).decoding
    assert (exp.task.template, exp.task.max_length, exp.task.pools) == ("alpaca_short", 512, ("seen",))
    assert (how.beams, how.no_repeat_ngram, how.repetition_penalty, how.max_new_tokens) == (8, 6, 1.8, 120)
    assert exp.task.context is not exp.task.name.startswith("dolly")


def test_the_short_prompt_is_alpaca_loras() -> None:
    form = template_for("alpaca_short", byte_tokenizer())
    assert isinstance(form, TextTemplate)
    assert form.prompt("Name a river.") == "### Instruction:\nName a river.\n\n### Response:\n"
    assert form.lead + "The Nile." + form.closing == "The Nile.</s>"


@pytest.mark.parametrize(
    ("words", "clients"),
    [
        (["pfedgpt_dolly"], 8),
        (["pfedgpt_dolly", "task.dealing=task_specific"], 8),
        (["pfedgpt_dolly", "task.clients_per_language=50"], 50),
        (["pfedgpt_flan1"], 7),
        (["pfedgpt_flan2"], 6),
        (["pfedgpt_flan2", "task.dealing=dirichlet", "task.clients_per_language=20"], 20),
    ],
    ids=["dolly", "dolly, tasks", "dolly, 50", "flan 1", "flan 2", "flan 2, 20"],
)
def test_both_ways_to_deal_clients_are_an_override_away(words: list[str], clients: int) -> None:
    assert seen_clients(compose(words[:1], words[1:])) == clients


@pytest.fixture(scope="module")
def seven_billion() -> Plan:
    few = "methods=[fedavg,fedprox,fedadam,mix_grid,pfedgpt]"
    return make_plan(compose(["pfedgpt_alpaca7b"], [few]), memory_gb=24)


def test_alpaca_trains_4194304_numbers_and_sends_them_both_ways(seven_billion: Plan) -> None:
    assert SIGMA == 4_194_304
    for name in ("fedavg", "fedprox", "fedadam", "mix_grid", "pfedgpt"):
        assert seven_billion.sizes[name].shared == SIGMA, METHODS[name].title
    wire = {row.stage.method: row.estimate.wire for row in seven_billion.stages if row.stage.kind == "strategy"}
    assert wire["pfedgpt"] == wire["fedavg"] == 8 * 4 * SIGMA
    assert seven_billion.model.parameters == 6_738_423_808
    assert seven_billion.model.layers == 64


def test_alpaca_in_8_bits_fits_24_gb(seven_billion: Plan) -> None:
    assert seven_billion.fit.fits[1]
    base = max(row.estimate.base for row in seven_billion.stages)
    inside = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert base == inside + 2 * (6_738_423_808 - inside)
    assert base < 7.1e9
    assert max(row.estimate.memory for row in seven_billion.stages) < 0.9 * 24e9


def test_memory_is_of_all_layers_of_a_block_whichever_carry_adapters() -> None:
    some = dimensions(compose(["pfedgpt_alpaca7b"], []).model, kind="generation")
    every = dimensions(compose(["pfedgpt_alpaca7b"], ["model.targets=all-linear"]).model, kind="generation")
    assert len(some.linears) == 64
    assert some.all_linears == every.linears == every.all_linears
    assert len(every.linears) == 224
