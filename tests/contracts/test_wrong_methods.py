"""Every wrong method is caught, by a run or by a check of the kit, with its name and the rule that it breaks."""

from __future__ import annotations

from dataclasses import replace

import pytest
from contract_kit import CHECKS, Bench, check_all
from wrong_methods import CHANGES, entry, right

from fedtailor.core.errors import TailorError

RULES = {
    "writes_to_received": "'ctx.received' is what the server sent and read-only",
    "changes_the_base": "changed the frozen base: bert.embeddings.word_embeddings.weight; a client function trains",
    "forgets_private_between_rounds": "goes on from the PRIVATE state that came back",
    "forgets_private_in_the_end": "the personal model uses the client's PRIVATE state",
    "trains_what_is_settled": "settled PRIVATE parameters stay as the first round made them",
    "shares_what_is_private": "its file says '-> PRIVATE', but it declares no PRIVATE parameter",
    "shares_what_an_overlay_keeps": "an overlay has the specs of the method's PRIVATE parameters",
    "sends_nan": "NaN or Inf in the update; updates, metrics and logits of",
    "measures_nan": "NaN or Inf in the metrics ['drift']; updates, metrics and logits of",
    "answers_nan": "test loss is nan, by Personalised.logits; updates, metrics and logits of",
    "sums_the_loss": "a loss is (k,) = (",
    "measures_too_few": "a local update's metrics are (K,) = (",
    "reports_nothing": "a local update returns a Report, not None",
    "lanes_without_budgets": "Personalised.lanes are client-major, every client at the budgets [1, 2]",
    "spectra_of_a_lane_too_few": "Personalised.spectra are (K, R), K = ",
    "answers_one_class_less": "Personalised.logits are (k, b, C) = (",
    "per_budget_without_budgets": "per_budget=True needs a personaliser with budgeted=True",
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench.make(tmp_path_factory.mktemp("bench"))


def test_the_method_that_they_are_made_from_is_right(bench: Bench) -> None:
    check_all(right(), bench)


def test_every_mistake_has_its_rule() -> None:
    assert set(RULES) == set(CHANGES)


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_method_is_caught_by_name(name: str, bench: Bench) -> None:
    with pytest.raises((TailorError, AssertionError)) as caught:
        check_all(entry(name), bench)
    print(f"{type(caught.value).__name__}: {caught.value}")
    assert f"method {name}" in str(caught.value)
    assert RULES[name] in str(caught.value)


def test_a_missing_configuration_is_one_clear_failure(bench: Bench) -> None:
    bare = replace(right(), name="bare", tiny=None)
    for check in CHECKS:
        with pytest.raises(AssertionError, match=r"the ENTRY of method bare needs `tiny`"):
            check(bare, bench)
