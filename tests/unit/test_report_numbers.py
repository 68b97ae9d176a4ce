"""The numbers of a report: pooling, spread, wins, the paired comparison, and the two tables of text."""

from __future__ import annotations

from math import isnan, nan, sqrt
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fedtailor.core.config import validate
from fedtailor.core.errors import DataError
from fedtailor.core.messages import METRIC_COLUMNS, metric_row
from fedtailor.experiment.config import Experiment
from fedtailor.models.families import locate_module
from fedtailor.report import heatmaps, names, page, summary, tables
from fedtailor.report.facts import RunData, RunFacts, read_facts
from fedtailor.report.grid import latex, markdown
from fedtailor.report.measures import ACCURACY
from fedtailor.report.names import leaves, percent
from fedtailor.report.scores import blocks, checked, results_table, scored_rows

NOTHING = pd.DataFrame(columns=list(METRIC_COLUMNS))


def score(method: str, client: str, correct: int, n: int, budget: int = 8, **more: Any) -> dict[str, Any]:
    pool, language, _ = client.split("/")
    coordinates = {"pool": pool, "language": language, "client": client, "seed": 1} | more
    measured = {"metric": "accuracy", "value": correct / n, "weight": float(n)}
    return metric_row(stage="personalise", method=method, budget=budget, **coordinates, **measured)


def scored(*rows: dict[str, Any]) -> pd.DataFrame:
    return scored_rows(checked(pd.DataFrame(list(rows))))


def only(frame: pd.DataFrame, **where: Any) -> Any:
    for column, value in where.items():
        frame = frame[frame[column] == value]
    (row,) = frame.to_dict("records")
    return row


def test_a_language_is_pooled_over_clients_not_averaged() -> None:
    table = results_table(scored(score("lora", "seen/amh/0", 1, 1), score("lora", "seen/amh/1", 0, 9)))
    row = only(table, language="amh")
    assert (row["mean"], row["n_clients"], row["n_examples"], row["n_seeds"]) == (0.1, 2, 10, 1)


def test_spread_is_the_sample_sd_over_seeds() -> None:
    rows = [score("lora", "seen/amh/0", k, 10, seed=seed) for seed, k in ((1, 2), (2, 4), (3, 9))]
    row = only(results_table(scored(*rows)), language="amh")
    assert row["mean"] == pytest.approx(0.5)
    assert row["sd"] == pytest.approx(sqrt((0.3**2 + 0.1**2 + 0.4**2) / 2))


def test_one_seed_has_no_spread_anywhere() -> None:
    frame = scored(score("lora", "seen/amh/0", 1, 2))
    assert isnan(only(results_table(frame), language="amh")["sd"])
    (block,) = blocks(frame)
    assert block.cells["amh", "lora"].sd is None
    assert summary.summary_records([block], [], {})[0]["sd"] is None
    assert percent(None) == "–"


def test_the_average_weighs_languages_equally_within_a_seed() -> None:
    rows = [
        score("lora", "seen/amh/0", 100, 100), score("lora", "seen/eng/0", 0, 1),
        score("lora", "seen/amh/0", 50, 100, seed=2), score("lora", "seen/eng/0", 1, 1, seed=2),
    ]  # fmt: skip
    row = only(results_table(scored(*rows)), language="average")
    assert row["mean"] == pytest.approx((0.5 + 0.75) / 2)
    assert row["sd"] == pytest.approx(np.std([0.5, 0.75], ddof=1))


def test_methods_without_budget_stand_in_every_block_and_once_in_the_csv() -> None:
    frame = scored(
        score("base", "seen/amh/0", 1, 4, budget=-1),
        score("lora", "seen/amh/0", 2, 4, budget=2),
        score("lora", "seen/amh/0", 3, 4, budget=16),
    )
    assert [(b.budget, b.methods) for b in blocks(frame)] == [
        (2, ("base", "lora")),
        (16, ("base", "lora")),
    ]
    assert only(results_table(frame), method="base", language="amh")["budget"] == -1


def test_a_run_without_budgets_has_one_block_per_pool() -> None:
    rows = [score("base", f"{pool}/amh/0", 1, 4, budget=-1) for pool in ("unseen", "seen")]
    assert [(b.pool, b.budget) for b in blocks(scored(*rows))] == [("seen", None), ("unseen", None)]


def test_ties_count_as_a_win_for_each_tied_method() -> None:
    (block,) = blocks(
        scored(
            score("lora", "seen/amh/0", 1, 2), score("fedp2eft", "seen/amh/0", 1, 2),
            score("lora", "seen/eng/0", 0, 2), score("fedp2eft", "seen/eng/0", 2, 2),
        )
    )  # fmt: skip
    assert block.wins == {"lora": 1, "fedp2eft": 2}
    assert block.cells["amh", "lora"].best
    assert block.cells["amh", "fedp2eft"].best
    assert not block.average["lora"].best


def test_results_do_not_depend_on_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    rows = [
        score(m, f"seen/{lang}/{k}", int(rng.integers(0, 7)), 7, seed=s)
        for m in ("lora", "fedp2eft") for lang in ("amh", "eng") for k in range(5) for s in range(3)
    ]  # fmt: skip
    one = results_table(scored(*rows)).to_csv()
    assert results_table(scored(*[rows[k] for k in rng.permutation(len(rows))])).to_csv() == one


def test_a_number_given_twice_is_an_error_naming_the_client() -> None:
    with pytest.raises(DataError, match=r"client seen/amh/0, lora, budget 8, seed 1: accuracy is given twice"):
        scored(score("lora", "seen/amh/0", 1, 2), score("lora", "seen/amh/0", 2, 2))


@pytest.mark.parametrize("value", [1.5, -0.1, nan])
def test_an_accuracy_outside_the_unit_interval_is_an_error(value: float) -> None:
    with pytest.raises(DataError, match=r"client seen/amh/0, lora, budget 8: accuracy .* is not in \[0, 1\]"):
        scored(score("lora", "seen/amh/0", 1, 2) | {"value": value})


def test_missing_columns_are_an_error_naming_them() -> None:
    with pytest.raises(DataError, match=r"lack the columns \['weight'\]"):
        checked(pd.DataFrame([score("lora", "seen/amh/0", 1, 2)]).drop(columns="weight"))


def test_methods_that_lack_clients_are_named() -> None:
    frame = scored(
        score("base", "seen/amh/0", 1, 2, budget=-1), score("base", "seen/amh/1", 1, 2, budget=-1),
        score("lora", "seen/amh/1", 1, 2),
    )  # fmt: skip
    (sentence,) = summary.gaps(frame)
    assert sentence.startswith("Seen clients, LoRA, r = 8: 1 of 2 client results are missing")


def test_tables_are_in_the_papers_order_of_methods() -> None:
    mixed = ["zeta", "fedp2eft", "alpha", "lora", "base", "fedl2p", "majority", "bayestune_lora", "adalora"]
    assert names.in_method_order(mixed) == (
        "majority", "base", "lora", "adalora", "bayestune_lora", "fedl2p", "fedp2eft", "alpha", "zeta",
    )  # fmt: skip


@pytest.mark.parametrize(("module", "place"), [
    ("bert.encoder.layer.3.attention.self.query", (3, "Query")),
    ("bert.encoder.layer.3.attention.output.dense", (3, "Attn\nout")),
    ("bert.encoder.layer.11.output.dense", (11, "FFN\nout")),
    ("model.layers.27.mlp.gate_proj", (27, "FFN\ngate")),
    ("transformer.h.0.attn.c_attn", (0, "QKV")),
    ("encoder.block.5.odd.part", (5, "odd.part")),
    ("bert.pooler.dense", (None, "Pooler")),
    ("classifier", (None, "Classifier")),
])  # fmt: skip
def test_modules_are_placed_by_layer_and_part(module: str, place: tuple[int | None, str]) -> None:
    assert locate_module(module) == place


def test_language_distance_averages_over_pairs_of_different_clients() -> None:
    lam = {name: np.full((2, 2), x, np.float32) for name, x in {"a0": 0, "a1": 1, "b0": 3}.items()}
    table = heatmaps.language_distances(lam, {"a0": "amh", "a1": "amh", "b0": "eng", "gone": "eng"})
    assert list(table.index) == list(table.columns) == ["amh", "eng"]
    np.testing.assert_array_equal(table.to_numpy(), [[2.0, (6 + 4) / 2], [(6 + 4) / 2, np.nan]])


RUN: dict[str, Any] = {
    "run_id": "run_1", "status": "complete", "versions": {"torch": "2.13.0"},
    "overrides": [{"key": "lora.lr", "default": 1e-4, "value": 0.005}],
}  # fmt: skip


def facts_of(n_modules: int, **run: Any) -> RunFacts:
    tree = {"task": "cldr", "model": "tiny-bert", "base": {"name": "none", "rounds": 9}, "strategy": {"rounds": 30}}
    return read_facts(RUN | run, n_modules, checked(NOTHING), RunData(validate(Experiment, tree)))


def test_the_caption_names_everything_the_run_departs_from() -> None:
    found = blocks(scored(score("lora", "seen/amh/0", 1, 2)))
    words = " ".join(tables.table_grid(facts_of(74), found).caption)
    for part in ("cldr", "tiny-bert", "L = 74", "1 client in 1 language", "seeds 1.",
                 "off the shelf; ", "strategies: none", "lora.lr: 0.0001 → 0.005", "run_1",
                 "torch 2.13.0", "one seed"):  # fmt: skip
        assert part in words


@pytest.mark.parametrize("dealt", [True, False])
def test_the_label_skew_is_named_where_texts_were_dealt(dealt: bool) -> None:
    found = RunData(validate(Experiment, {"task": "texts"}), dealt=dealt)
    tiles = page._tiles(read_facts(RUN, 2, checked(NOTHING), found), RUN, {}, ACCURACY)
    assert ("Alpha (label skew)" in dict(tiles)) is dealt


def test_groups_that_are_no_languages_are_called_groups_of_classes_too() -> None:
    frames = [scored(score("lora", f"seen/{group}/0", 1, 2)) for group in ("amh", "all")]
    assert [blocks(frame)[0].measure.mean for frame in frames] == ["mean over languages", "mean over groups"]


def test_markdown_has_a_block_per_budget_with_the_best_in_bold() -> None:
    frame = scored(
        score("base", "seen/amh/0", 1, 4, budget=-1), score("base", "seen/amh/1", 1, 4, budget=-1),
        score("lora", "seen/amh/0", 2, 4), score("lora", "seen/amh/1", 4, 4),
        score("lora", "seen/amh/0", 0, 4, budget=2),
    )  # fmt: skip
    lines = markdown(tables.table_grid(facts_of(2), blocks(frame))).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert [line for line in lines if line.startswith("##")] == ["## r = 2", "## r = 8"]
    last = cells[len(cells) // 2 :]
    assert last[0] == ["Language", "Base", "LoRA"]
    assert last[2] == ["Amharic (amh)", "25.00 (–)", "**75.00** (–)"]
    assert last[-2:] == [["Average", "25.00 (–)", "**75.00** (–)"], ["Wins", "0", "**1**"]]


def test_the_csv_has_the_papers_layout() -> None:
    frame = scored(
        score("base", "seen/amh/0", 1, 4, budget=-1), score("lora", "seen/amh/0", 2, 4),
        score("base", "seen/eng/0", 1, 4, budget=-1), score("lora", "seen/eng/0", 0, 4),
    )  # fmt: skip
    table = tables.table_data(blocks(frame))
    assert list(table) == ["language", "name", "r8/base", "r8/base/sd", "r8/lora", "r8/lora/sd"]
    assert list(table["name"]) == ["Amharic", "English", "Average", "Wins"]
    assert list(table["r8/lora"]) == [50.0, 0.0, 25.0, 1]
    assert table["r8/lora/sd"].isna().all()


def test_latex_escapes_data_and_groups_columns_by_budget() -> None:
    frame = scored(score("my_method", "seen/50%/0", 1, 4, budget=2), score("my_method", "seen/50%/0", 1, 4, budget=4))
    tex = latex(tables.table_grid(facts_of(2, run_id="a_b&c"), blocks(frame)))
    for part in (r"a\_b\&c", r"my\_method", r"50\%", r"\toprule", r"$r$ = 2",
                 r"\cmidrule(lr){2-2} \cmidrule(lr){3-3}", r"\label{tab:seen}"):  # fmt: skip
        assert part in tex
    assert tex.count("{") == tex.count("}")


def test_many_methods_continue_in_further_latex_floats() -> None:
    rows = [score(f"m{k}", "seen/amh/0", 1, 4, budget=r) for k in range(9) for r in (1, 2, 4, 8)]
    tex = latex(tables.table_grid(facts_of(2), blocks(scored(*rows))))
    assert tex.count(r"\begin{table*}") == tex.count(r"\end{table*}") == 2
    assert tex.count(r"\label{") == 1


def test_nested_configuration_is_listed_by_dotted_key() -> None:
    tree = {"a": {"b": 1, "c": [1, "x"]}, "d": None, "e": [{"f": True}]}
    assert leaves(tree) == [("a.b", "1"), ("a.c", "[1, x]"), ("d", "null"), ("e[0].f", "true")]
