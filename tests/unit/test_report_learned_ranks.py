"""Learned ranks: from what workers commit to a figure and a table that say what the numbers mean."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from tiny import run_tiny, tiny

from fedtailor.core.messages import METRIC_COLUMNS, metric_row
from fedtailor.experiment.config import Experiment
from fedtailor.report import report_of, write_report
from fedtailor.report.facts import RunData
from fedtailor.report.grid import markdown
from fedtailor.report.learned_ranks import learned_ranks, ranks_figure, ranks_grid
from fedtailor.report.scores import checked
from fedtailor.report.style import Drawing, Missing, styled

MODULES = ("query", "value")
COUNTS = {1: {"seen/x/0": (5, 5), "seen/x/1": (10, 0), "seen/x/2": (9, 1)}, 2: {"seen/x/0": (8, 2)}}


def rows(methods: tuple[str, ...] = ("pf2lora", "homlora")) -> pd.DataFrame:
    """Seed 1 has three clients, seed 2 one; HOMLoRA's clients are all alike."""
    found: list[dict[str, Any]] = []
    for seed, clients in COUNTS.items():
        for k, client in enumerate(clients):
            here = {"stage": "personalise", "seed": seed, "pool": "seen", "language": "x", "client": client}
            for method in methods:
                found.append(metric_row(**here, method=method, metric="accuracy", value=0.5, weight=4.0))
                for m, module in enumerate(MODULES):
                    rank = 3.0 if method == "homlora" else 2.0 + m + (3 - k)
                    for metric, value in (("rank90", rank), ("entropy_rank", rank - 0.5)):
                        found.append(metric_row(**here, method=method, metric=metric, module=module, value=value))
    return checked(pd.DataFrame(found, columns=list(METRIC_COLUMNS)))


def test_a_row_per_client_and_module_has_both_ranks_and_the_label_entropy_of_its_seed() -> None:
    table = learned_ranks(rows(), COUNTS)
    assert len(table) == 2 * 4 * 2
    own = table.set_index(["method", "seed", "client", "module"]).loc["pf2lora"]
    assert own.loc[(1, "seen/x/0", "query"), ["rank90", "entropy_rank"]].tolist() == [5.0, 4.5]
    entropies = [own.loc[(seed, "seen/x/0", "value"), "label_entropy"] for seed in (1, 2)]
    assert entropies == pytest.approx([math.log(2), -0.8 * math.log(0.8) - 0.2 * math.log(0.2)])
    assert own.loc[(1, "seen/x/1", "value"), "label_entropy"] == 0
    assert learned_ranks(rows(), {1: COUNTS[1]}).loc[lambda t: t["seed"] == 2, "label_entropy"].isna().all()


def test_the_table_says_what_the_rule_is_and_correlates_within_seeds() -> None:
    grid = ranks_grid(learned_ranks(rows(), COUNTS))
    by_method = {row[0]: row[1:] for row in grid.rows}
    assert list(by_method) == ["HOMLoRA", "PF²LoRA"]
    assert by_method["HOMLoRA"] == ["3", "3.00", "3 to 3", "–", "2.50", "2.5 to 2.5", "–"]
    # Clients 0, 1, 2 of seed 1: 5.5, 4.5, 3.5 over entropies .69, 0, .33; seed 2 has one client, so no correlation.
    assert by_method["PF²LoRA"][:3] == ["3", "4.75", "3 to 6"]
    assert by_method["PF²LoRA"][3] == "+0.50"
    text = markdown(grid)
    for words in ("90 % of the sum", "depends on the spectrum", "Entropy rank is", "Spearman", "one label"):
        assert words in text


def test_the_figure_has_a_panel_per_method_and_rule_and_is_missing_only_where_there_is_something_to_show() -> None:
    assert ranks_figure(learned_ranks(rows(())[:0], COUNTS)) == []
    [gone] = ranks_figure(learned_ranks(rows(), {}))
    assert isinstance(gone, Missing)
    assert "which labels" in gone.reason
    with styled():
        [drawing] = ranks_figure(learned_ranks(rows(), COUNTS))
    assert isinstance(drawing, Drawing)
    axes = drawing.figure.axes
    assert [axis.get_title(loc="left") for axis in axes[:2]] == ["HOMLoRA", "PF²LoRA"]
    assert [axis.get_ylabel() for axis in axes] == ["rank90", "", "entropy rank", ""]
    modules, clients = axes[1].lines
    assert (len(modules.get_xdata()), len(clients.get_xdata())) == (8, 4)


def test_a_report_has_the_files_and_one_of_a_run_without_such_methods_has_none(tmp_path: Path) -> None:
    data = RunData(Experiment(), class_counts=COUNTS)
    files = write_report({"run_id": "r"}, rows(), {}, MODULES, tmp_path, data)
    names = {f"learned_ranks.{kind}" for kind in ("md", "tex", "csv")} | {"figures/learned_ranks.png"}
    assert names <= set(files)
    page = files["report.html"].read_text("utf-8")
    assert 'id="learned-ranks"' in page
    assert "Learned ranks, by method" in page
    assert len(pd.read_csv(files["learned_ranks.csv"])) == 16
    without = rows()[lambda frame: ~frame["metric"].isin(["rank90", "entropy_rank"])]
    files = write_report({"run_id": "r"}, without, {}, MODULES, tmp_path, data)
    assert not any("learned" in name for name in files), "of the earlier report, too"
    assert "Learned ranks" not in files["report.html"].read_text("utf-8")


def test_every_run_commits_the_ranks_of_every_client_and_module_and_its_folder_alone_gives_the_report(
    tmp_path: Path,
) -> None:
    words = (
        "methods=[homlora,hetlora,pf2lora,prior_shift]", "base.name=none", "strategy.rounds=1", "strategy.cohort=6",
        "task.languages=[eng,yor]", *(f"{name}.local_steps=2" for name in ("homlora", "hetlora", "pf2lora")),
        "hetlora.ranks={name: list, values: [1, 2, 3, 1, 2, 3]}",
    )  # fmt: skip
    run = run_tiny(tiny(tmp_path, *words))
    frame = run.metrics("personalise")
    ranks = frame[frame["metric"] == "rank90"]
    assert ranks.groupby("method")["client"].nunique().to_dict() == dict.fromkeys(("homlora", "hetlora", "pf2lora"), 12)
    assert ranks.groupby(["method", "client"])["module"].nunique().unique().tolist() == [2], "query and value"
    assert (ranks["value"] >= 1).all()
    bound = frame[(frame["metric"] == "rank") & (frame["method"] == "hetlora")].set_index("client")["value"]
    own = ranks[ranks["method"] == "hetlora"]
    assert (own["value"] <= own["client"].map(bound)).all()
    first = Path(report_of(run)).parent
    entropies = pd.read_csv(first / "learned_ranks.csv")["label_entropy"]
    assert entropies.notna().all()
    again = Path(report_of(run, tmp_path / "again")).parent
    assert (first / "learned_ranks.csv").read_bytes() == (again / "learned_ranks.csv").read_bytes()
