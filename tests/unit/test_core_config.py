"""How layers and overrides become one tree, and how problems are worded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from fedtailor.core.config import (  # fmt: skip
    Config,
    at_absent,
    completed,
    deviations,
    dotted_keys,
    flatten,
    validate,
)
from fedtailor.core.errors import ConfigError
from fedtailor.core.overrides import merge_layers
from fedtailor.experiment.compose import compose, load_preset, preset_names
from fedtailor.experiment.config import Experiment
from fedtailor.tasks.task import task_config


def problems_of(*overrides: str, presets: tuple[str, ...] = ()) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        compose(list(presets), list(overrides))
    return caught.value.problems


def test_later_layers_win_and_lists_are_replaced() -> None:
    tree = merge_layers([{"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}}], ["a.b=5"])
    assert tree == {"a": {"b": 5, "c": [3]}}


def test_values_are_read_as_yaml() -> None:
    tree = merge_layers([], ["x=1e-4", "y=[lora, base]", "z=null", "p=/a=b", "s='two words'", "e={k: 1}"])
    assert tree == {"x": 1e-4, "y": ["lora", "base"], "z": None, "p": "/a=b", "s": "two words", "e": {"k": 1}}


def test_a_name_replaces_the_section_that_a_preset_filled() -> None:
    exp = compose(["demo"], ["task=masakhanews"])
    assert exp.task == type(exp.task)(name="masakhanews")


def test_keys_after_a_name_join_it() -> None:
    exp = compose(["demo"], ["model=mbert", "model.path=/models/mbert"])
    assert (exp.model.name, exp.model.path) == ("mbert", "/models/mbert")


def test_keys_before_a_name_join_it_too() -> None:
    exp = compose(["demo"], ["task.languages=[swa]", "task=masakhanews"])
    assert (exp.task.name, exp.task.languages) == ("masakhanews", ("swa",))


def test_a_name_in_an_earlier_layer_is_kept_by_keys_in_a_later_one() -> None:
    assert merge_layers([{"model": "mbert"}, {"model": {"revision": "main"}}]) == {
        "model": {"name": "mbert", "revision": "main"}
    }


@pytest.mark.parametrize("word", ["rounds", "=3", ""])
def test_a_word_without_key_or_value_is_named(word: str) -> None:
    with pytest.raises(ConfigError, match=r"is not an override; write key=value"):
        merge_layers([], [word])


@pytest.mark.parametrize("word", ["methods=[a,", "task.path=${oc.env:NO_SUCH_VARIABLE}", "a=${b}"])
def test_an_unreadable_value_names_the_override(word: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the override|interpolation"):
        merge_layers([], [word])


def test_all_problems_are_found_at_once() -> None:
    found = problems_of("strategy.rounds=-1", "methods=[lra]", "base.rouds=3", "engine.backend=rey")
    assert len(found) == 4
    assert any("'strategy.rounds': input should be greater than or equal to 0, got -1" in p for p in found)
    assert any("unknown method 'lra'; did you mean 'lora'?" in p for p in found)
    assert any("unknown key 'base.rouds'; did you mean 'rounds'?" in p for p in found)
    assert any("allowed: ray, serial (did you mean 'ray'?), got 'rey'" in p for p in found)


def test_an_unknown_top_level_key_finds_the_section_where_it_exists() -> None:
    (problem,) = problems_of("clients_per_language=3")
    assert "did you mean 'task.clients_per_language'?" in problem


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        (
            "lora.lrr=1",
            "; did you mean 'lr'? (keys here: batch_size, dropout, epochs, local_steps, lr, max_grad_norm, scale)",
        ),
        ("lora.ratee=1", " (keys here: batch_size, dropout, epochs, local_steps, lr, max_grad_norm, scale)"),
        ("fedp2eft.lambda=1", "; did you mean 'fedp2eft.stage1.lambda_lr'? (keys here: "),
        ("fedl2p.lambda_lr=1", " (keys here: constant_correction, finetune, "),
        ("bayestune_lora.lr=1", "; did you mean 'bayestune_lora.search.lr' or 'bayestune_lora.finetune.lr'? (keys"),
        ("base.lr=1", " (keys here: cohort, name, rounds, seed)"),
    ],
)
@pytest.mark.parametrize("methods", ["methods=[lora,fedp2eft]", "methods=[base]"])
def test_an_unknown_key_in_a_section_is_likened_to_keys_of_that_section_alone(
    word: str, hint: str, methods: str
) -> None:
    (problem,) = problems_of(word, methods)
    assert problem.startswith(f"unknown key '{word.split('=')[0]}'{hint}")


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["base=none"], ["strategy"]),
        (["base.rounds=0"], ["strategy"]),
        (["methods=[lora]"], ["base"]),
        ([], ["base", "strategy"]),
        (["base=none", "methods=[lora]"], []),
    ],
)
def test_a_cohort_is_checked_where_one_is_drawn(words: list[str], keys: list[str]) -> None:
    words = ["task=cldr", "task.clients_per_language=1", "base.cohort=500", "strategy.cohort=500", *words]
    seen = len(task_config("cldr").languages)
    expected = [f"'{key}.cohort': 500 clients asked, the seen pool has {seen} (allowed: 1 ... {seen})" for key in keys]
    if expected:
        assert problems_of(*words) == expected
    else:
        assert compose([], words).base.cohort == 500


@pytest.mark.parametrize(
    ("word", "problem"),
    [
        ("model.targets=query", "'model.targets': allowed: all-linear; or must be a list such as [a,b], got 'query'"),
        ("privacy.secagg.modulus_bits=16", "'privacy.secagg.modulus_bits': allowed: 32, 64, got 16"),
        ("engine.zero.stage=5", "'engine.zero.stage': allowed: 1, 3, got 5"),
    ],
)
def test_what_is_allowed_is_listed_whole_and_nothing_else(word: str, problem: str) -> None:
    assert problems_of(word) == [problem]


def test_only_methods_that_can_answer_with_text_are_allowed_for_a_task_that_asks_for_it() -> None:
    (problem,) = problems_of("task=cldr_instruct", "methods=[majority,lora]")
    allowed = problem.partition("(allowed: ")[2].rstrip(")").split(", ")
    assert "majority" not in allowed
    pool = "task.validation_per_class=2"  # some of them ask for one
    assert compose([], ["task=cldr_instruct", pool, f"methods=[{','.join(allowed)}]"]).methods == tuple(allowed)


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        (["methods=[lora]"], "(allowed: float32, fedavg.adapter=lora, base=none)"),
        (["methods=[fedavg]"], "(allowed: float32, fedavg.adapter=lora)"),
        (["base=dept", "methods=[lora]"], "(allowed: float32, base=none)"),
        (["base=none", "methods=[dept]"], "(allowed: float32)"),
    ],
)
def test_what_is_allowed_with_a_narrow_base_depends_on_who_trains_it(words: list[str], allowed: str) -> None:
    (problem,) = problems_of("model.weights=bfloat16", "engine.dtype=bfloat16", *words)
    assert problem.endswith(allowed)


def test_truth_values_are_not_numbers() -> None:
    (problem,) = problems_of("base.rounds=true")
    assert problem == "'base.rounds': must be a number, got True"


def test_a_scalar_for_a_list_and_for_a_section_is_explained() -> None:
    seeds, engine = problems_of("seeds=42", "engine=ray")
    assert seeds == "'seeds': must be a list such as [a,b], got 42"
    assert engine == "'engine': is a section; set the keys below it, got 'ray'"


def test_no_message_speaks_of_python() -> None:
    words = [
        "seeds=4",
        "engine=x",
        "base.rounds=x",
        "task.languages=3",
        "strategy.cohort=inf",
        "model.heads=3",
    ]
    for problem in problems_of(*words):
        assert not any(word in problem for word in ("tuple", "dict", "instance", "Value error", "pydantic"))


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid_as_it_is(name: str) -> None:
    below = ["fed_aya_mobilellama"] if name == "fedit" else []  # a layer of settings for instructions
    assert compose([*below, name], []).methods
    assert set(load_preset(name)) <= set(Experiment.model_fields)


def test_the_paper_scale_preset_departs_from_the_defaults_in_task_model_and_seeds_alone() -> None:
    exp = compose(["masakhanews_fedp2eft"], [])
    assert set(deviations(exp, Experiment())) == {"task.name", "model.name", "seeds"}
    assert (exp.base.rounds, exp.strategy.rounds, exp.seeds) == (100, 150, (42, 52, 62))


def test_dotted_keys_and_flatten_agree() -> None:
    exp = Experiment()
    assert list(flatten(exp)) == list(dotted_keys(Experiment))
    assert "fedp2eft.psg.lr" in flatten(exp)


def test_a_tree_is_frozen() -> None:
    exp = Experiment()
    with pytest.raises(ValueError, match="frozen"):
        exp.base.rounds = 3  # type: ignore[misc]


class Inner(Config):
    when_absent: ClassVar[Mapping[str, Any]] = {"late": 0.0}
    early: int = 1
    late: float = 0.5


class Outer(Config):
    inner: Inner = Inner()
    name: str = "x"


@pytest.mark.parametrize("stored", [{"inner": {"early": 2}}, {"inner": {}}, {}])
def test_a_stored_tree_without_a_late_key_means_what_was_done_before_it(stored: dict[str, Any]) -> None:
    assert validate(Outer, completed(Outer, stored)).inner.late == 0.0
    assert validate(Outer, stored).inner.late == 0.5


def test_a_late_key_that_is_stored_is_kept_and_is_left_out_of_names_only_at_its_old_value() -> None:
    assert completed(Outer, {"inner": {"late": 0.1}, "name": "y"}) == {"inner": {"late": 0.1}, "name": "y"}
    assert at_absent(Outer()) == {}
    assert at_absent(Outer(inner=Inner(late=0.0))) == {"inner": {"late": True}}


def test_numbers_that_are_not_finite_are_refused() -> None:
    class Rates(Config):
        lr: float = 1.0

    with pytest.raises(ConfigError, match=r"'lr'.*finite"):
        validate(Rates, {"lr": float("nan")})
