"""Paired comparisons of a report: which pairs, which clients, which verdicts, in numbers and in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fedtailor.core.messages import metric_row
from fedtailor.report import significance
from fedtailor.report.grid import latex, markdown
from fedtailor.report.scores import blocks, checked, scored_rows
from fedtailor.report.significance import Pair, pairs_grids, sentences


def score(method: str, client: str, value: float, budget: int = 8, seed: int = 1) -> dict[str, Any]:
    return metric_row(
        stage="personalise", method=method, budget=budget, seed=seed, pool="seen", language="amh", client=client,
        metric="accuracy", value=value, weight=10.0,
    )  # fmt: skip


def compare(rows: list[dict[str, Any]]) -> dict[tuple[int | None, str, str], Pair]:
    scored = scored_rows(checked(pd.DataFrame(rows)))
    pairs = significance.compare(scored, blocks(scored))
    return {(pair.budget, pair.method, pair.other): pair for pair in pairs}


def table(methods: dict[str, float], clients: int = 20, budget: int = 8) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    rows = []
    for k in range(clients):
        ease = 0.4 + 0.2 * rng.random()
        for method, gain in methods.items():
            at = -1 if method in ("base", "majority") else budget
            rows.append(score(method, f"c{k:02d}", ease + gain + 0.02 * rng.standard_normal(), at))
    return rows


def test_every_method_meets_base_lora_and_fedp2eft_once() -> None:
    methods = ("majority", "base", "lora", "adalora", "fedl2p", "fedp2eft")
    pairs = compare(table(dict.fromkeys(methods, 0.0)))
    assert [key[1:] for key in pairs] == [
        ("lora", "base"), ("adalora", "base"), ("adalora", "lora"), ("fedl2p", "base"), ("fedl2p", "lora"),
        ("fedp2eft", "base"), ("fedp2eft", "lora"), ("fedp2eft", "adalora"), ("fedp2eft", "fedl2p"),
    ]  # fmt: skip


def test_the_test_is_students_paired_t_test_over_clients_averaged_over_seeds() -> None:
    gains = {"c0": (0.1, 0.3), "c1": (0.4, 0.4), "c2": (0.0, 0.5)}
    rows = []
    for client, per_seed in gains.items():
        for seed, gain in enumerate(per_seed):
            rows += [score("base", client, 0.2, -1, seed), score("lora", client, 0.2 + gain, 8, seed)]
    pair = compare(rows)[8, "lora", "base"]
    lora, base = np.array([0.4, 0.6, 0.45]), np.array([0.2, 0.2, 0.2])
    expected = stats.ttest_rel(lora, base)
    assert (pair.n_clients, pair.difference) == (3, pytest.approx(np.mean(lora - base)))
    assert pair.p == pytest.approx(expected.pvalue)
    assert pair.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert pair.standard_error == pytest.approx(np.std(lora - base, ddof=1) / np.sqrt(3))


def test_only_clients_and_seeds_that_both_methods_have_are_compared() -> None:
    rows = [score("base", f"c{k}", 0.5, -1, seed) for k in range(4) for seed in (1, 2)]
    rows += [score("lora", f"c{k}", 0.6 + 0.01 * k, 8, 1) for k in range(3)]
    assert compare(rows)[8, "lora", "base"].n_clients == 3


def test_p_values_are_corrected_over_all_pairs_of_a_pool_and_budget() -> None:
    pairs = list(compare(table({"base": 0.0, "lora": 0.012, "fedp2eft": 0.02})).values())
    assert [pair.p_holm for pair in pairs] == pytest.approx(significance.holm([float(pair.p or 0) for pair in pairs]))
    assert all((pair.p_holm or 0) >= (pair.p or 0) for pair in pairs)


def test_holm_agrees_with_the_step_down_definition() -> None:
    p = [0.01, 0.02, 0.03, 0.5]
    assert significance.holm(p) == pytest.approx([0.04, 0.06, 0.06, 0.5])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "better"), (-0.1, "worse"), (0.0, "undecided")])
def test_a_clear_difference_gives_a_verdict(gain: float, verdict: str) -> None:
    assert compare(table({"base": 0.0, "lora": gain}))[8, "lora", "base"].verdict == verdict


def test_equal_accuracies_are_undecided_with_p_one() -> None:
    rows = [score(m, f"c{k}", k / 7, b) for k in range(5) for m, b in (("base", -1), ("lora", 8))]
    pair = compare(rows)[8, "lora", "base"]
    assert (pair.difference, pair.interval, pair.p, pair.verdict) == (0.0, (0.0, 0.0), 1.0, "undecided")


def test_one_client_gives_a_difference_without_a_test() -> None:
    pair = compare([score("base", "c", 0.25, -1), score("lora", "c", 0.5)])[8, "lora", "base"]
    assert (pair.difference, pair.interval, pair.p, pair.p_holm) == (0.25, None, None, None)
    assert pair.verdict == "undecided"


def test_sentences_name_the_budgets_of_a_mixed_verdict() -> None:
    rows = table({"base": 0.0, "lora": 0.1}) + [r for r in table({"lora": 0.0}, budget=2) if r["method"] == "lora"]
    base = {r["client"]: r["value"] for r in rows if r["method"] == "base"}
    rows = [r | {"value": base[r["client"]]} if r["budget"] == 2 else r for r in rows]
    pairs = list(compare(rows).values())
    assert sentences(pairs, "seen") == ["LoRA: better than Base (r = 8); undecided against Base (r = 2)."]


def test_the_tables_say_difference_interval_and_p_and_escape_data() -> None:
    pairs = list(compare(table({"base": 0.0, "my_method": 0.1})).values())
    (grid,) = pairs_grids(pairs, "Scale 0.1.")
    text, tex = markdown(grid), latex(grid)
    assert "| my\\_method – Base |" in text
    assert r"my\_method -- Base" in tex
    assert "Scale 0.1." in text
    assert "Scale 0.1." in tex
    assert "p \\<0.001" in text
    assert tex.count("{") == tex.count("}")
    assert list(significance.table(pairs)) == list(significance.COLUMNS)
