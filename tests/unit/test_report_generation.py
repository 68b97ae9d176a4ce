"""Reports of generation: ROUGE-L leads, every sample counts for its own language, all measures stand side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtailor.cli.terminal import summary_table
from fedtailor.core.config import validate
from fedtailor.core.errors import DataError
from fedtailor.core.messages import metric_row
from fedtailor.experiment.config import Experiment
from fedtailor.models.families import locate_module
from fedtailor.report import significance, write_report
from fedtailor.report.facts import RunData
from fedtailor.report.heatmaps import rank_structure
from fedtailor.report.measures import GENERATION
from fedtailor.report.scores import blocks, checked, primary, results_table, scored_rows
from fedtailor.report.tables import measure_blocks
from fedtailor.report.wandb import final_results

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
MODULES = [f"model.layers.{block}.{part}" for block in range(3) for part in PARTS]
RUN: dict[str, Any] = {
    "run_id": "aya", "status": "complete", "overrides": [],
}  # fmt: skip
LANGUAGES = {"seen/en/0": ("en", "fr"), "seen/en/1": ("en",), "seen/te/0": ("te", "en"), "seen/fr/0": ("fr",)}


def scored(client: str, language: str, value: float, n: int, method: str = "lora", budget: int = 2, **more: Any) -> Any:
    """ROUGE-L of n samples in a language."""
    where = {"stage": "personalise", "pool": client.split("/")[0], "client": client, "seed": 1, "metric": "rougeL"}
    return metric_row(**(where | {"language": language, "method": method, "budget": budget} | more), value=value,
                      weight=float(n))  # fmt: skip


def scores_of(*rows: Any) -> pd.DataFrame:
    return scored_rows(checked(pd.DataFrame(list(rows))))


def whole() -> Iterator[Any]:
    """A small run: two seeds, base and two methods at two budgets, all measures, ranks and curves."""
    rng = np.random.default_rng(5)
    plan = {"base": [-1], "lora": [2, 4], "fedp2eft": [2, 4]}
    for seed in (1, 2):
        for client, spoken in LANGUAGES.items():
            for pool in ("seen", "unseen"):
                own = client.replace("seen", pool, 1)
                for method, budget in ((m, r) for m, budgets in plan.items() for r in budgets):
                    here: dict[str, Any] = {"method": method, "budget": budget, "seed": seed}
                    for language in spoken:
                        for name in (*(m.name for m in GENERATION), "loss"):
                            yield scored(own, language, float(rng.random()), 7, **here, metric=name)
                    for module in MODULES if method == "fedp2eft" else ():
                        yield scored(own, spoken[0], budget, 20, **here, metric="kept_rank", module=module)
            for number in range(3):
                where = {"seed": seed, "pool": "seen", "client": client, "language": spoken[0], "weight": 5.0}
                yield metric_row(
                    stage="strategy", method="fedp2eft", round=number, metric="psg_loss", value=1.0, **where
                )


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    data = RunData(validate(Experiment, {"task": "fed_aya"}), kind="generation")
    return write_report(RUN, pd.DataFrame(list(whole())), {}, MODULES, tmp_path_factory.mktemp("aya"), data)


def test_accuracy_leads_where_there_is_any_else_rouge_l() -> None:
    rouge = scored("seen/en/0", "en", 0.5, 3)
    assert primary(pd.DataFrame([rouge])).name == "rougeL"
    assert primary(pd.DataFrame([rouge, scored("seen/en/0", "en", 0.5, 3, metric="accuracy")])).name == "accuracy"
    assert primary(pd.DataFrame([rouge]).iloc[:0]).name == "accuracy"


def test_results_are_by_language_where_the_groups_are_languages_else_by_group() -> None:
    assert primary(pd.DataFrame([scored("seen/en/0", "te", 0.5, 3)])).group == "language"
    assert primary(pd.DataFrame([scored("seen/en/0", "open_qa", 0.5, 3)])).group == "group"


def test_a_sample_counts_for_its_own_language_whichever_client_has_it() -> None:
    table = results_table(scores_of(
        scored("seen/en/0", "en", 0.2, 30), scored("seen/en/0", "fr", 0.9, 10), scored("seen/fr/0", "fr", 0.1, 30)
    )).set_index("language")  # fmt: skip
    assert table.loc["fr", "mean"] == pytest.approx((0.9 * 10 + 0.1 * 30) / 40)
    assert table.loc["en", "mean"] == pytest.approx(0.2)
    assert table.loc["average", "mean"] == pytest.approx((0.3 + 0.2) / 2)
    assert table.loc[["en", "fr", "average"], "n_clients"].tolist() == [1, 2, 2]
    assert table.loc["average", "n_examples"] == 70


def test_a_client_is_compared_once_with_all_its_samples() -> None:
    frame = scores_of(*(
        scored(client, language, value, n, method, budget=budget)
        for method, budget, shift in (("base", -1, 0.0), ("lora", 2, 0.1))
        for client, language, value, n in (
            ("seen/en/0", "en", 0.2, 30), ("seen/en/0", "fr", 0.4 + shift, 10), ("seen/fr/0", "fr", 0.1 + shift, 30)
        )
    ))  # fmt: skip
    (pair,) = significance.compare(frame, blocks(frame))
    assert pair.n_clients == 2
    assert pair.difference == pytest.approx((0.1 * 10 / 40 + 0.1) / 2)


@pytest.mark.parametrize("value", [1.2, -0.1, float("nan")])
def test_a_share_outside_the_unit_interval_is_an_error(value: float) -> None:
    with pytest.raises(DataError, match=r"client seen/en/0, lora, budget 2: rougeL .* is not in \[0, 1\]"):
        checked(pd.DataFrame([scored("seen/en/0", "en", value, 3)]))


def test_a_generation_run_has_every_file_and_says_rouge_l_in_each(report: dict[str, Path]) -> None:
    assert {"metrics_seen.md", "metrics_seen.csv", "metrics_unseen.tex", "table_seen.md"} <= set(report)
    assert {"figures/rougeL_per_language_seen.png", "figures/rougeL_vs_budget.svg"} <= set(report)
    assert json.loads(report["summary.json"].read_text("utf-8"))["metric"] == "rougeL"
    for name in ("report.html", "table_seen.md", "table_seen.tex", "significance.md", "significance.tex"):
        words = report[name].read_text("utf-8")
        assert "ROUGE-L" in words, name
        assert "accuracy" not in words.lower().replace("config", ""), name


def test_the_page_and_the_terminal_name_measure_unit_and_mean(report: dict[str, Path]) -> None:
    page = report["report.html"].read_text("utf-8")
    assert "ROUGE-L in percent, mean over languages (SD over seeds)" in page
    assert "has the highest ROUGE-L, mean over languages" in page
    assert "All measures" in page
    table = summary_table(pd.DataFrame(list(whole())))
    assert table is not None
    assert table.title == "ROUGE-L in %, mean over languages and seeds"


def test_all_measures_stand_side_by_side_with_wins_of_each(report: dict[str, Path]) -> None:
    table = pd.read_csv(report["metrics_seen.csv"])
    assert list(table.columns) == ["budget", "method", "metric", "en", "en/sd", "fr", "fr/sd", "te", "te/sd",
                                   "average", "average/sd", "wins"]  # fmt: skip
    assert list(table["metric"].unique()) == ["meteor", "rouge1", "rouge2", "rougeL", "exact_match"]
    assert len(table) == 2 * 3 * 5
    assert (table.groupby(["budget", "metric"])["wins"].sum() == 3).all()
    own = table[(table["metric"] == "rougeL") & (table["budget"] == 4) & (table["method"] == "lora")]
    main = pd.read_csv(report["table_seen.csv"]).set_index("language")
    assert own["te"].item() == main.loc["te", "r4/lora"]
    assert own["average"].item() == main.loc["average", "r4/lora"]


def test_rows_of_the_markdown_table_are_budgets_and_columns_languages(report: dict[str, Path]) -> None:
    lines = [line for line in report["metrics_seen.md"].read_text("utf-8").splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")] == [
        "Budget", "Method", "English (en)", "French (fr)", "Telugu (te)", "Average", "Wins (languages)",
    ]  # fmt: skip
    assert lines[2].split("|")[1].strip() == "r = 2"
    assert lines[2].split("|")[3].count("/") == 4


def test_the_summary_has_every_measure_of_a_method(report: dict[str, Path]) -> None:
    record = json.loads(report["summary.json"].read_text("utf-8"))["results"][0]
    assert set(record["metrics"]) == {"meteor", "rouge1", "rouge2", "rougeL", "exact_match"}
    assert record["metrics"]["rougeL"] == {"mean": record["mean"], "sd": record["sd"]}


def test_a_classification_run_has_no_table_of_measures() -> None:
    frame = scores_of(scored("seen/en/0", "en", 0.5, 3, metric="accuracy"))
    assert measure_blocks(frame) == {}


def test_w_and_b_gets_every_measure() -> None:
    summary, table = final_results(pd.DataFrame(list(whole())))
    assert summary["final/seen/lora/r2/rougeL"] == pytest.approx(
        table.query("pool=='seen' and method=='lora' and budget==2 and metric=='rougeL' and language=='average'")[
            "mean"
        ].item()
    )
    assert {name.rsplit("/", 1)[1] for name in summary} == {*(m.name for m in GENERATION), "loss"}


def test_llama_modules_are_placed_by_block_and_projection() -> None:
    places = [locate_module(f"model.layers.27.{part}") for part in PARTS]
    assert {layer for layer, _ in places} == {27}
    names = [part.replace("\n", " ") for _, part in places]
    assert names == ["Query", "Key", "Value", "Attn out", "FFN gate", "FFN up", "FFN down"]


def test_ranks_of_a_llama_are_drawn_without_a_row_outside_the_blocks() -> None:
    frame = checked(pd.DataFrame(list(whole())))
    (drawing,) = rank_structure(frame, MODULES)
    axis = drawing.figure.axes[0]  # type: ignore[union-attr]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["Layer 0", "Layer 1", "Layer 2"]
    assert len(axis.get_xticklabels()) == 7
