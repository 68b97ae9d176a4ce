"""Runs side by side: what differs, whose accuracy is better, and when a paired test is allowed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from fedtailor.cli.views import show_comparison
from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.core.messages import metric_row
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import base_seed, overrides_of, to_json
from fedtailor.report import compare_wandb
from fedtailor.report.compare import Comparison, compare
from fedtailor.report.compare_files import at_every_budget, compare_runs, write
from fedtailor.report.wandb import identity
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import METRIC_SCHEMA, METRICS, table_of
from fedtailor.storage.run_folder import DONE, RunFolder
from fedtailor.tracking.wandb_key import KEY

CLIENTS = tuple(f"seen/{code}/0{k}" for code in ("swa", "yor") for k in range(3))
Accuracy = Callable[[str, int, int, str], float]
"""Method, budget (-1: none), seed and client to an accuracy that is a multiple of 0.01."""


def flat_half(method: str, budget: int, seed: int, client: str) -> float:
    return 0.5


class Lab:
    """Makes runs without training: stages that are done, with the accuracies that a test chooses."""

    def __init__(self, root: Path) -> None:
        self.root, self.storage = root, Storage(root)

    def run(
        self,
        name: str,
        accuracy: Accuracy = flat_half,
        words: Sequence[str] = (),
        clients: Sequence[str] = CLIENTS,
        artifacts: Mapping[str, str] | None = None,
        data: str = "",
        labels: Sequence[str] = ("a", "b"),
        unfinished: bool = False,
        metric: str = "accuracy",
    ) -> RunFolder:
        """``artifacts``: method to an artifact shared with another run; ``data``: salt of the clients' texts."""
        defaults = ["methods=[base,lora]", "budgets=[2,8]", "base.name=none", f"storage={self.root}"]
        exp = compose([], [*defaults, *words])
        run = RunFolder.create(self.storage, name, to_json(exp), overrides_of(exp))
        stages = [
            {"key": f"personalise/{method}/seed{seed}", "kind": "personalise", "method": method, "seed": seed,
             "artifact": f"{(artifacts or {}).get(method, f'p-{name}-{method}')}-{seed}", "parent": f"model-{seed}",
             "strategy": None, "rounds": 0, "cohort": 0, "budgets": list(exp.budgets), "data": f"data-{data}{seed}"}
            for seed in exp.seeds for method in exp.methods
        ]  # fmt: skip
        run.set_stages(stages)
        for seed in exp.seeds:
            artifact, own = f"data-{data}{seed}", base_seed(exp, seed)
            content = [{"id": c, "sha256": f"{data}{own}{c}", "n_train": 2, "n_test": 100} for c in clients]
            self.storage.write_json(f"artifacts/{artifact}/manifest.json", {"labels": list(labels), "clients": content})
        for stage in stages[: -1 if unfinished else None]:
            if not self.storage.exists(f"artifacts/{stage['artifact']}/{DONE}"):
                self._commit(run, stage, accuracy, clients, metric)
        run.set_status("interrupted" if unfinished else "complete")
        return run

    def _commit(
        self, run: RunFolder, stage: Mapping[str, Any], accuracy: Accuracy, clients: Sequence[str], metric: str
    ) -> None:
        method, seed = stage["method"], stage["seed"]
        rows = [
            metric_row(stage="personalise", method=method, seed=seed, pool=client.split("/")[0], budget=budget,
                       language=client.split("/")[1], client=client, metric=metric,
                       value=accuracy(method, budget, seed, client), weight=100.0)
            for client in clients
            for budget in ((-1,) if method in ("base", "majority") else stage["budgets"])
        ]  # fmt: skip
        run.log(stage).commit(0, {METRICS: table_of(rows, METRIC_SCHEMA)}, {"kind": "chunk"})
        self.storage.write_json(f"artifacts/{stage['artifact']}/{DONE}", {"modules": ["m"]})

    def compare(self, *names: str) -> Comparison:
        return compare(self.storage, names)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path / "runs")


def rows_of(content: Comparison) -> dict[str, tuple[str, ...]]:
    return dict(content.changed)


def printed(content: Comparison, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    show_comparison(console, content, Path("out"))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


# ---- what differs ------------------------------------------------------------------------------------------


def test_keys_that_differ_are_listed_with_the_value_of_each_run(lab: Lab) -> None:
    lab.run("one", words=["lora.lr=0.001"])
    lab.run("two", words=["lora.lr=0.01"])
    assert rows_of(lab.compare("one", "two")) == {"lora.lr": ("0.001", "0.01")}


def test_keys_that_change_no_number_of_these_runs_are_only_named(lab: Lab) -> None:
    lab.run("one")
    lab.run("two", words=["fedp2eft.psg.lr=0.5", "engine.actors=2", "wandb.project=x", "engine.dtype=bfloat16"])
    content = lab.compare("one", "two")
    assert rows_of(content) == {"engine.dtype": ("float32", "bfloat16")}
    assert set(content.neutral) == {"fedp2eft.psg.lr", "engine.actors", "wandb.project"}


def test_each_run_shows_its_state_and_its_digest_once_it_is_finished(lab: Lab) -> None:
    lab.run("one")
    lab.run("two", unfinished=True)
    content = lab.compare("one", "two")
    facts = dict(content.facts)
    assert facts["State"] == ("complete", "interrupted, 1 of 2 stages")
    assert facts["Digest"] == (str(content.runs[0].digest)[:12], "none yet")
    assert any("two is unfinished" in note for note in content.notes)


# ---- results -----------------------------------------------------------------------------------------------


def test_each_run_says_how_many_rounds_its_strategies_took(lab: Lab) -> None:
    for name, rounds in (("one", 3), ("two", 2)):
        run = lab.run(name, words=["strategy.rounds=3"])
        stage = {**run.stages()[0], "key": "strategy/fedl2p/seed42", "kind": "strategy", "artifact": f"s-{name}"}
        run.set_stages([*run.stages(), {**stage, "method": "fedl2p"}])
        for number in range(rounds):
            rows = [metric_row(stage="strategy", method="fedl2p", seed=42, round=number, metric="loss", value=1.0)]
            run.log(stage).commit(number, {METRICS: table_of(rows, METRIC_SCHEMA)}, {"kind": "round"})
    assert dict(lab.compare("one", "two").facts)["Strategies"] == ("3 rounds", "3 rounds (FedL2P: 2)")


def test_the_best_of_a_budget_is_over_all_runs_and_methods(lab: Lab) -> None:
    def better_with_rank(method: str, budget: int, seed: int, client: str) -> float:
        return 0.55 if method == "base" else {2: 0.4, 8: 0.7}[budget]

    lab.run("one")
    lab.run("two", better_with_rank)
    table = at_every_budget(lab.compare("one", "two").results)
    best = table.loc[table["best"], ["run", "method", "budget"]]
    assert best.to_numpy().tolist() == [["two", "base", 2], ["two", "lora", 8]]


def test_a_budget_that_a_run_lacks_is_a_gap_but_a_method_without_budgets_is_in_every_column(lab: Lab) -> None:
    lab.run("one", words=["budgets=[2,8]"])
    lab.run("two", words=["budgets=[8,16]"])
    table = at_every_budget(lab.compare("one", "two").results)
    assert table.groupby(["run", "method"])["budget"].agg(list).to_dict() == {
        ("one", "base"): [2, 8, 16], ("one", "lora"): [2, 8], ("two", "base"): [2, 8, 16], ("two", "lora"): [8, 16],
    }  # fmt: skip


def test_means_are_over_languages_then_seeds_with_the_sd_over_seeds(lab: Lab) -> None:
    def of_seed(method: str, budget: int, seed: int, client: str) -> float:
        return {42: 0.4, 52: 0.6}[seed] + (0.1 if "yor" in client else 0.0)

    lab.run("one", of_seed, words=["seeds=[42,52]"])
    lab.run("two", of_seed, words=["seeds=[42,52]", "lora.lr=0.5"])
    row = lab.compare("one", "two").results.iloc[0]
    assert row["mean"] == pytest.approx(0.55)
    assert row["sd"] == pytest.approx(np.std([0.4, 0.6], ddof=1))
    assert (row["n_clients"], row["n_seeds"]) == (6, 2)


def test_averages_over_other_languages_or_seeds_are_noted(lab: Lab) -> None:
    lab.run("one", words=["seeds=[42,52]"])
    lab.run("two", clients=CLIENTS[:3], data="x")
    notes = " ".join(lab.compare("one", "two").notes)
    assert "different languages of the seen pool (one: 2, two: 1)" in notes
    assert "different seeds (one: 42, 52, two: 42)" in notes


# ---- paired differences ------------------------------------------------------------------------------------


def noisy(shift: float, salt: int) -> Accuracy:
    def accuracy(method: str, budget: int, seed: int, client: str) -> float:
        number = np.random.default_rng([salt, seed, CLIENTS.index(client), budget + 1]).integers(-4, 5)
        return float(round(0.5 + shift + number / 100, 2))

    return accuracy


def test_the_difference_is_tested_over_clients_after_averaging_the_shared_seeds(lab: Lab) -> None:
    one, two = noisy(0, 1), noisy(0.1, 2)
    lab.run("one", one, words=["seeds=[42,52]"])
    lab.run("two", two, words=["seeds=[42,52,62]", "lora.lr=0.5"])
    content = lab.compare("one", "two")
    (pair,) = (p for p in content.pairs if p.method == "lora" and p.budget == 8)
    gains = [np.mean([two("lora", 8, s, c) - one("lora", 8, s, c) for s in (42, 52)]) for c in CLIENTS]
    test = stats.ttest_1samp(gains, 0.0)
    assert (pair.run, pair.earlier, pair.seeds, pair.n_clients) == ("two", "one", (42, 52), 6)
    assert pair.difference == pytest.approx(np.mean(gains))
    assert pair.p == pytest.approx(test.pvalue)
    assert pair.interval == pytest.approx(tuple(test.confidence_interval(0.95)))
    assert pair.verdict == "better"


def test_p_values_are_corrected_over_the_pairs_of_a_budget_and_methods_without_one_by_themselves(lab: Lab) -> None:
    for number, name in enumerate(("one", "two", "three")):
        lab.run(name, noisy(0.01 * number, number), words=[f"lora.lr=0.{number + 1}"])
    pairs = lab.compare("one", "two", "three").pairs
    for budget, method in ((2, "lora"), (8, "lora"), (None, "base")):
        family = [p for p in pairs if p.budget == budget]
        assert [p.method for p in family] == [method] * 3
        smallest = min(family, key=lambda p: p.p or 0.0)
        assert smallest.p_holm == pytest.approx(min(1.0, 3 * (smallest.p or 0.0)))


def test_results_taken_from_the_same_stages_are_named_so_and_not_tested(lab: Lab) -> None:
    lab.run("one", artifacts={"base": "shared"})
    lab.run("two", noisy(0.1, 2), words=["lora.lr=0.5"], artifacts={"base": "shared"})
    content = lab.compare("one", "two")
    told = {p.method: (p.same, p.p is None) for p in content.pairs}
    assert told == {"base": (True, True), "lora": (False, False)}
    assert "same stages" in printed(content)


@pytest.mark.parametrize(("words", "data", "reason"), [
    ([], "other", "one and two have different clients (the populations differ): no paired test."),
    (["seeds=[52]"], "", "one and two have no seed in common: no paired test."),
    (["task.alpha=5.0"], "other", "one and two have different clients (the populations differ): no paired test."),
])  # fmt: skip
def test_runs_without_shared_clients_get_no_test_but_a_reason(
    lab: Lab, words: list[str], data: str, reason: str
) -> None:
    lab.run("one")
    lab.run("two", words=["task.max_length=64", *words], data=data)
    content = lab.compare("one", "two")
    assert content.pairs == ()
    assert reason in content.notes


def test_clients_that_cannot_be_told_are_taken_for_different(lab: Lab) -> None:
    lab.run("one")
    lab.run("two", words=["task.max_length=64"], data="gone")
    lab.storage.delete("artifacts/data-gone42")
    content = lab.compare("one", "two")
    assert content.pairs == ()
    assert any(note.startswith("The clients of two cannot be told") for note in content.notes)


def test_majority_is_a_floor_and_not_compared(lab: Lab) -> None:
    lab.run("one", words=["methods=[majority,lora]"])
    lab.run("two", noisy(0, 2), words=["methods=[majority,lora]", "lora.lr=0.5"])
    assert {p.method for p in lab.compare("one", "two").pairs} == {"lora"}


# ---- what is written ---------------------------------------------------------------------------------------


def test_all_files_are_written_alike_each_time(lab: Lab, tmp_path: Path) -> None:
    lab.run("one")
    lab.run("two", noisy(0.1, 2), words=["lora.lr=0.5"])
    content, folder = compare_runs(lab.storage, ["one", "two"])
    names = ["compare.csv", "compare.md", "compare.png", "compare.svg", "compare_pairs.csv"]
    assert sorted(p.name for p in folder.iterdir()) == names
    (tmp_path / "again").mkdir()
    write(content, tmp_path / "again")
    assert all((folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)
    table = pd.read_csv(folder / "compare.csv")
    lora = table.loc[table["method"] == "lora", ["run", "budget", "n_clients"]]
    assert lora.to_numpy().tolist() == [["one", 2, 6], ["one", 8, 6], ["two", 2, 6], ["two", 8, 6]]
    pairs = pd.read_csv(folder / "compare_pairs.csv")
    assert set(pairs["verdict"]) <= {"better", "worse", "undecided"}
    assert len(pairs) == 3


def test_markdown_marks_the_best_and_escapes_what_runs_hold(lab: Lab) -> None:
    lab.run("a_b", words=["task.path=x|y*z"])
    lab.run("two", lambda method, budget, seed, client: 0.5 if method == "base" else 0.7)
    folder = compare_runs(lab.storage, ["a_b", "two"])[1]
    text = (folder / "compare.md").read_text("utf-8")
    assert r"x\|y\*z" in text
    assert r"a\_b" in text
    assert "thin lines without markers: methods without a budget" in text, "the caption of the figure"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    assert ["two", "LoRA", "**70.00**", "**70.00**", "6 × 1"] in cells
    assert ["two", "Base", "50.00", "50.00", "6 × 1"] in cells


def test_the_terminal_shows_four_runs_in_a_hundred_columns(lab: Lab) -> None:
    names = [f"preset-with-a-long-name-{k}" for k in range(4)]
    for k, name in enumerate(names):
        lab.run(name, noisy(0.02 * k, k), words=[f"lora.lr=0.{k + 1}", "budgets=[2,4,8,16]"])
    text = printed(lab.compare(*names))
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines() if " LoRA " in line and line.strip().startswith("D – A")]
    assert len(rows) == 1
    assert len(rows[0]) == len(["D", "–", "A", "LoRA"]) + 2 * 4
    assert "D – B" not in text
    assert "differences not from A" in text


def test_the_terminal_shows_lists_in_their_brackets_from_where_they_differ(lab: Lab) -> None:
    lab.run("one", words=["task.languages=[swa,yor]"])
    lab.run("two", words=["task.languages=[swa,hau,yor]"])
    (line,) = (line for line in printed(lab.compare("one", "two")).splitlines() if "task.languages" in line)
    assert line.split() == ["task.languages", "[…,", "yor]", "[…,", "hau,", "yor]"]


def test_a_comparison_replaces_an_earlier_one_of_its_own_but_nothing_else(lab: Lab, tmp_path: Path) -> None:
    lab.run("one")
    lab.run("two", words=["lora.lr=0.5"])
    _, folder = compare_runs(lab.storage, ["one", "two"])
    assert folder.parent == lab.root
    assert compare_runs(lab.storage, ["one", "two"])[1] == folder
    assert compare_runs(lab.storage, ["two", "one"])[1] != folder
    (folder / "compare.md").unlink()
    with pytest.raises(StorageError, match="is there and is no comparison; give --out"):
        compare_runs(lab.storage, ["one", "two"])
    with pytest.raises(StorageError, match="is there already and not an empty folder"):
        compare_runs(lab.storage, ["one", "two"], folder)


def test_runs_with_one_budget_are_drawn(lab: Lab, tmp_path: Path) -> None:
    lab.run("one", words=["budgets=[8]"])
    lab.run("two", noisy(0.1, 2), words=["budgets=[8]", "lora.lr=0.5"])
    assert (compare_runs(lab.storage, ["one", "two"], tmp_path / "out")[1] / "compare.png").stat().st_size > 5000


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("mixed"))
    lab.run("one")
    lab.run("two", words=["lora.lr=0.5"])
    lab.run("news", words=["task=masakhanews"], data="news")
    lab.run("classes", words=["task.alpha=5.0"], data="classes", labels=("a", "c"))
    RunFolder.create(lab.storage, "empty", to_json(compose([], ["methods=[lora]", f"storage={lab.root}"])))
    return lab


@pytest.mark.parametrize(("names", "error", "words"), [
    (["one"], ConfigError, "needs two different runs or more, got one"),
    (["one", "one"], ConfigError, "needs two different runs or more, got one, one"),
    (["one", "two", "one"], ConfigError, "run 'one' is named twice"),
    (["one", "tow"], StorageError, r"no run 'tow' in .*; did you mean 'two'\? \(runs there: .*one, .*two\)"),
    (["one", "empty"], StorageError, r"run 'empty' \(running\) has committed no score .* fedtailor resume empty"),
    (["one", "news"], ConfigError, r"different tasks cannot be compared .*'one': cldr, 'news': masakhanews"),
    (["one", "classes"], ConfigError, r"different classes cannot be compared .*'one': a, b; 'classes': a, c"),
])  # fmt: skip
def test_runs_that_cannot_stand_side_by_side_are_refused(
    mixed: Lab, names: list[str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        compare_runs(mixed.storage, names)
    assert not [p for p in mixed.root.iterdir() if p.name.startswith("compare-")]


# ---- W&B ---------------------------------------------------------------------------------------------------

ONLINE = ("wandb.mode=online", "wandb.entity=lab", "wandb.project=my runs")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def called(*_: Any, **__: Any) -> None:
        raise AssertionError("W&B was asked")

    for name in ("_default_entity", "make_report"):
        monkeypatch.setattr(compare_wandb, name, called)


@pytest.mark.usefixtures("no_network")
def test_runs_that_are_not_all_online_have_no_link(lab: Lab) -> None:
    lab.run("one", words=ONLINE)
    lab.run("two", words=["wandb.mode=offline"])
    assert compare_runs(lab.storage, ["one", "two"])[0].wandb == ()


@pytest.mark.usefixtures("no_network")
def test_online_runs_are_linked_by_project_and_id_and_a_report_needs_a_package(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare_wandb, "find_spec", lambda name: None)
    monkeypatch.setattr(compare_wandb, "address", lambda entity, project: f"https://wandb.test/{entity}/{project}")
    runs = [lab.run("one", words=ONLINE), lab.run("two", words=[*ONLINE, "lora.lr=0.5"])]
    content, folder = compare_runs(lab.storage, ["one", "two"])
    ids = ", ".join(f"{run.run_id}: {identity(run)}" for run in runs)
    assert content.wandb == (
        f"https://wandb.test/lab/my runs (runs {ids})",
        "A W&B report of these runs needs the package wandb-workspaces.",
    )
    assert content.wandb[1] in (folder / "compare.md").read_text("utf-8")


def test_an_address_is_on_the_server_that_wandb_is_set_up_for() -> None:
    import wandb

    assert compare_wandb.address("a lab", "p") == f"{wandb.setup().settings.app_url}/a%20lab/p"


def test_a_report_holds_the_table_the_runs_and_the_values_that_all_have(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    class Report:
        url = "https://wandb.test/report"

        def __init__(self, **given: Any) -> None:
            made.append(given)

        def save(self) -> None:
            made.append({"key": os.environ.get(KEY)})

    fake = ModuleType("wandb_workspaces.reports.v2")
    for name in ("Runset", "BarPlot", "RunComparer", "MarkdownBlock", "PanelGrid"):
        setattr(fake, name, lambda _name=name, **given: (_name, given))
    fake.Report = Report  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb_workspaces", ModuleType("wandb_workspaces"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(compare_wandb, "find_spec", lambda name: object())
    monkeypatch.setenv(KEY, "secret")
    runs = [lab.run("one", words=ONLINE), lab.run("two", words=[*ONLINE, "budgets=[8]"])]
    content = compare_runs(lab.storage, ["one", "two"])[0]
    assert content.wandb[-1] == "Report: https://wandb.test/report"
    given, saved = made
    assert (given["entity"], given["project"], given["title"]) == ("lab", "my runs", "fedtailor: one, two")
    (_, text), (_, grid) = given["blocks"]
    assert text["text"].startswith("# one · two")
    ((_, runset),) = grid["runsets"]
    assert runset["filters"] == f"Metric('ID') in {[identity(run) for run in runs]}"
    drawn = [panel["metrics"] for name, panel in grid["panels"] if name == "BarPlot"]
    assert drawn == [["final/seen/base/accuracy"], ["final/seen/lora/r8/accuracy"]]
    assert saved == {"key": "secret"}


def test_trouble_with_wandb_is_told_and_fails_nothing(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> str:
        raise OSError("no route to host")

    lab.run("one", words=ONLINE)
    lab.run("two", words=[*ONLINE, "lora.lr=0.5"])
    monkeypatch.setattr(compare_wandb, "find_spec", lambda name: object())
    monkeypatch.setattr(compare_wandb, "make_report", broken)
    told = compare_runs(lab.storage, ["one", "two"])[0].wandb
    assert told[0].startswith("http")
    assert told[1] == "No W&B report: OSError: no route to host"
    monkeypatch.setattr(compare_wandb, "places", broken)
    assert compare_runs(lab.storage, ["one", "two"])[0].wandb == ("No link to W&B: OSError: no route to host",)


def test_runs_of_generation_are_compared_by_rouge_l(tmp_path: Path) -> None:
    names, clients = ("one", "two"), tuple(f"seen/{code}/0{k}" for code in ("en", "te") for k in range(3))
    lab, words = Lab(tmp_path / "runs"), ["task=cldr_instruct"]

    def better(method: str, budget: int, seed: int, client: str) -> float:
        return 0.4 if method == "lora" else 0.3

    def plain(method: str, budget: int, seed: int, client: str) -> float:
        return 0.3

    for run, scores in zip(names, (plain, better), strict=True):
        lab.run(run, scores, words, clients, labels=("en", "te"), metric="rougeL")
    content = lab.compare(*names)
    (lora,) = {pair.difference for pair in content.pairs if pair.method == "lora"}
    assert lora == pytest.approx(0.1)
    assert "ROUGE-L in %, mean over languages" in " ".join(printed(content).split())
    out = tmp_path / "out"
    out.mkdir()
    write(content, out)
    text = (out / "compare.md").read_text("utf-8")
    assert "ROUGE-L points" in text
    assert "accuracy" not in text.lower()


def test_runs_whose_samples_are_in_other_languages_are_refused(tmp_path: Path) -> None:
    lab = Lab(tmp_path / "runs")
    for name, labels in (("one", ("en", "te")), ("two", ("en", "fr"))):
        lab.run(name, words=["task=cldr_instruct"], labels=labels, metric="rougeL", data=name)
    with pytest.raises(ConfigError, match="runs with different languages cannot be compared"):
        lab.compare("one", "two")
