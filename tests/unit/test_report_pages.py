"""A whole report: its files, its page, equal bytes from equal input, what is left out of partial data."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from fedtailor.core.messages import metric_row
from fedtailor.experiment.config import Experiment
from fedtailor.report import write_report
from fedtailor.report.facts import RunData

MODULES = [f"bert.encoder.layer.0.{part}" for part in ("attention.self.query", "output.dense")] + ["classifier"]
EVIL = "<script>alert('x')</script> & $x_1$ --> |"
RUN: dict[str, Any] = {
    "run_id": EVIL, "status": "complete", "failures": 0, "warnings": 1, "versions": {"torch": EVIL},
    "config": {"task": {"name": "cldr", "path": EVIL}, "base": {"rounds": 2}},
    "overrides": [{"key": EVIL, "default": EVIL, "value": EVIL}], "stages": [{"key": EVIL, "hash": "1a"}],
    "hardware": {"cpu": EVIL}, "git": {"commit": "abc"},
    "unknown_tokens": {"tokens-1": {"amh": [30, 40], EVIL: [0, 10]}, "tokens-2": {"amh": [30, 40]}},
}  # fmt: skip
RUN_DATA = RunData(Experiment())


def rows(languages: tuple[str, ...] = ("amh", EVIL), pools: tuple[str, ...] = ("seen", "unseen")) -> Iterator[Any]:
    rng = np.random.default_rng(3)
    for pool in pools:
        for language in languages:
            for k in range(2):
                client = {"seed": 1, "pool": pool, "language": language, "client": f"{pool}/{language}/{k}"}
                for method, budgets in {"base": [-1], "lora": [2, 4], "fedp2eft": [2, 4]}.items():
                    for budget in budgets:
                        here = client | {
                            "stage": "personalise",
                            "method": method,
                            "budget": budget,
                            "weight": 10.0,
                        }
                        yield metric_row(**here, metric="accuracy", value=int(rng.integers(3, 9)) / 10)
                        yield metric_row(**here, metric="loss", value=float(rng.random()))
                        if method == "fedp2eft":
                            yield metric_row(**here, metric="tied_at_threshold", value=0.5)
                            for module in MODULES:
                                yield metric_row(**here, metric="kept_rank", module=module, value=float(budget))
                for number in range(3):
                    for stage, method in (("base", "fedavg"), ("strategy", "fedp2eft")):
                        here = client | {"stage": stage, "method": method, "round": number, "weight": 5.0}
                        yield metric_row(**here, metric="train_loss", value=1 / (1 + number + k))


def lambdas(frame: pd.DataFrame) -> dict[tuple[str, int], dict[str, Any]]:
    rng = np.random.default_rng(4)
    return {("fedp2eft", 1): {c: rng.random((3, 4), np.float32) for c in sorted(set(frame["client"]))}}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    frame = pd.DataFrame(list(rows()))
    return write_report(RUN, frame, lambdas(frame), MODULES, tmp_path_factory.mktemp("report"), RUN_DATA)


class Structure(HTMLParser):
    """Open tags, ids and addresses of a page."""

    VOID = frozenset({"meta", "br", "img", "link", "hr", "input"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action")]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def test_a_full_run_gives_every_file(report: dict[str, Path]) -> None:
    figures = ["accuracy_per_group_seen", "accuracy_per_group_unseen", "accuracy_vs_budget",
               "clients_per_language", "lambda_distance_fedp2eft", "rank_structure_fedp2eft",
               "training_curves_base_fedavg", "training_curves_strategy_fedp2eft"]  # fmt: skip
    expected = {"report.html", "results.csv", "summary.json"}
    expected |= {f"{name}.{kind}" for name in ("table_seen", "table_unseen", "significance")
                 for kind in ("md", "tex", "csv")}  # fmt: skip
    expected |= {f"figures/{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert set(report) == expected
    assert all(path.is_file() and path.stat().st_size for path in report.values())


def test_unknown_tokens_stand_in_every_table_and_on_the_page(report: dict[str, Path]) -> None:
    sentence = "Tokens of texts that the model does not know: Amharic 75.0 %; below 0.1 % in"
    for name in ("table_seen.md", "table_unseen.md", "table_seen.tex", "report.html"):
        assert sentence in report[name].read_text("utf-8").replace("\\", "")
    assert (
        '<td class="num">80</td><td class="num">60</td><td class="num">75.0</td>' in report["report.html"].read_text()
    )


def test_the_page_is_well_formed_and_asks_for_nothing(report: dict[str, Path]) -> None:
    page = report["report.html"].read_text("utf-8")
    structure = Structure(page)
    assert structure.open == []
    assert all(address.startswith(("#", "data:")) for address in structure.addresses)
    assert not {"script", "link", "iframe", "object"} & set(structure.tags)
    assert re.findall(r"url\((?!#|data:)|@import", page) == []


def test_the_page_holds_every_figure_as_it_is_in_its_file(report: dict[str, Path]) -> None:
    sources = [a for a in Structure(report["report.html"].read_text("utf-8")).addresses if a.startswith("data:")]
    shown = {base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) for source in sources}
    assert shown == {path.read_bytes() for name, path in report.items() if name.endswith(".svg")}
    assert all(ElementTree.fromstring(figure).tag.endswith("svg") for figure in shown)


def test_every_id_of_the_page_is_unique_and_every_link_leads_to_one(report: dict[str, Path]) -> None:
    page = report["report.html"].read_text("utf-8")
    structure = Structure(page)
    targets = {address[1:] for address in structure.addresses if address.startswith("#")}
    targets |= set(re.findall(r"url\(#([^)]+)\)", page))
    assert targets <= set(structure.ids)
    assert len(structure.ids) == len(set(structure.ids))


def test_data_are_escaped_on_the_page(report: dict[str, Path]) -> None:
    page = report["report.html"].read_text("utf-8")
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10
    assert "Amharic" in page


def test_data_are_escaped_in_markdown(report: dict[str, Path]) -> None:
    lines = report["table_seen.md"].read_text("utf-8").splitlines()
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines if line.startswith("|")}
    assert bars == {5}
    assert not any("<script" in re.sub(r"\\<", "", line) for line in lines)


def test_equal_rows_in_any_order_give_equal_bytes(tmp_path: Path, report: dict[str, Path]) -> None:
    frame = pd.DataFrame(list(rows()))
    again = write_report(RUN, frame.sample(frac=1, random_state=1), lambdas(frame), MODULES, tmp_path, RUN_DATA)
    differing = [name for name in report if report[name].read_bytes() != again[name].read_bytes()]
    assert differing == []


def test_the_summary_tells_who_beats_base(report: dict[str, Path]) -> None:
    found = json.loads(report["summary.json"].read_text("utf-8"))
    records = {(r["pool"], r["budget"], r["method"]): r for r in found["results"]}
    assert len(records) == 2 * 2 * 3
    assert records["seen", 2, "base"]["versus_base"] is None
    assert records["seen", 2, "lora"]["sd"] is None
    versus = records["unseen", 4, "fedp2eft"]["versus_base"]
    assert versus["n_clients"] == 4
    assert versus["verdict"] == ("undecided" if versus["p_holm"] >= 0.05 else "better")
    low, high = versus["ci95"]
    assert low < versus["mean_difference"] < high
    assert "ties" in found["tie_rule"].replace("tied", "ties")


def test_the_csv_has_the_documented_columns(report: dict[str, Path]) -> None:
    table = pd.read_csv(report["results.csv"])
    assert list(table) == [
        "pool",
        "language",
        "method",
        "budget",
        "metric",
        "mean",
        "sd",
        "n_clients",
        "n_examples",
        "n_seeds",
    ]
    assert set(table["metric"]) == {"accuracy", "loss"}
    assert table["sd"].isna().all()


def test_drawing_leaves_the_callers_matplotlib_alone(tmp_path: Path) -> None:
    frame = pd.DataFrame([row for row in rows(("amh",), ("seen",)) if row["stage"] == "base"])
    with mpl.rc_context({"font.size": 31.0}):
        write_report(RUN, frame, {}, MODULES, tmp_path, RUN_DATA)
        assert mpl.rcParams["font.size"] == 31.0


def partial(frame: pd.DataFrame, case: str) -> pd.DataFrame:
    tested = frame["stage"] == "personalise"
    keep = {
        "one pool": frame["pool"] == "seen",
        "one language": frame["language"] == "amh",
        "one method": ~tested | (frame["method"] == "lora"),
        "base only": tested & (frame["method"] == "base"),
        "curves only": ~tested,
        "nothing": tested & ~tested,
    }
    return frame[keep[case]]


@pytest.mark.parametrize(("case", "with_strategies", "absent", "present"), [
    ("one pool", True, ["unseen"], ["lambda_distance", "table_seen"]),
    ("one language", True, ["lambda_distance"], ["rank_structure", "accuracy_vs_budget"]),
    ("one method", False, ["rank_structure", "lambda_distance"], ["training_curves", "table_unseen"]),
    ("base only", False, ["accuracy_vs_budget", "training_curves"], ["accuracy_per_group", "table_seen"]),
    ("curves only", False, ["table_", "accuracy_", "rank_"], ["training_curves"]),
    ("nothing", False, ["table_", "figures/", "significance", "cost"], ["results.csv", "summary.json"]),
])  # fmt: skip
def test_what_the_data_do_not_allow_is_left_out_with_a_sentence(
    tmp_path: Path, case: str, with_strategies: bool, absent: list[str], present: list[str]
) -> None:
    frame = partial(pd.DataFrame(list(rows())), case)
    files = write_report({}, frame, lambdas(frame) if with_strategies else {}, MODULES, tmp_path, RUN_DATA)
    assert not [name for name in files for part in absent if part in name]
    assert all(any(part in name for name in files) for part in present)
    page = files["report.html"].read_text("utf-8")
    assert Structure(page).open == []
    assert "Left out: " in page


def test_files_of_an_earlier_report_are_replaced(tmp_path: Path) -> None:
    frame = pd.DataFrame(list(rows(("amh",))))
    write_report({}, frame[frame["stage"] == "personalise"], {}, MODULES, tmp_path, RUN_DATA)
    (tmp_path / "notes.txt").write_text("mine")
    files = write_report({}, frame[frame["stage"] == "base"], {}, MODULES, tmp_path, RUN_DATA)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(files) | {"notes.txt"}


@pytest.mark.parametrize(("base", "lora", "sentence"), [
    (2, 5, "LoRA at r = 2 has the highest mean over languages, 50.00 %; per client"),
    (5, 2, "Base has the highest mean over languages, 50.00 %."),
    (5, 5, "Base has the highest mean over languages, 50.00 % (shared with LoRA)."),
])  # fmt: skip
def test_the_page_opens_with_the_best_method(tmp_path: Path, base: int, lora: int, sentence: str) -> None:
    found = [
        metric_row(
            stage="personalise", method=method, seed=1, pool="seen", language="amh", client=f"c{k}",
            budget=budget, metric="accuracy", value=correct / 10, weight=10.0,
        )
        for method, budget, correct in (("base", -1, base), ("lora", 2, lora))
        for k in range(2)
    ]  # fmt: skip
    page = write_report({}, pd.DataFrame(found), {}, MODULES, tmp_path, RUN_DATA)["report.html"].read_text("utf-8")
    assert f"Seen clients: {sentence}" in page
