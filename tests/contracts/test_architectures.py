"""Every architecture on the list works exactly, or is refused by the plan with the reason; a table says which."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from architecture_table import TABLE, Bench, folder_of, measure
from architectures import ARCHITECTURES, BOTH, CELLS, Architecture, title
from tiny import run_tiny, talk, tiny

from fedtailor.experiment.plan import make_plan
from fedtailor.report import report_of
from fedtailor.tasks.source import TaskKind

WRITTEN = [line for line in TABLE.read_text("utf-8").splitlines() if line.startswith("|")][2:]


@pytest.fixture(scope="module")
def benches(tmp_path_factory: pytest.TempPathFactory) -> Mapping[TaskKind, Bench]:
    return {kind: Bench.make(kind, tmp_path_factory.mktemp("bench")) for kind in BOTH}


@pytest.mark.parametrize(
    ("number", "architecture", "kind"), [(i, *cell) for i, cell in enumerate(CELLS)], ids=[title(*c) for c in CELLS]
)
def test_each_works_exactly_or_is_refused(
    number: int, architecture: Architecture, kind: TaskKind, benches: Mapping[TaskKind, Bench], tmp_path: Path
) -> None:
    row = measure(architecture, benches[kind], tmp_path)
    assert row.plan.startswith("refused: ") or (row.lora and row.fedp2eft and row.same and row.exported)
    assert row.line(architecture.name, kind) == WRITTEN[number], "`make architectures` writes the table anew"


def test_the_table_has_no_further_rows() -> None:
    assert len(WRITTEN) == len(CELLS)


def named(name: str) -> Architecture:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name)


ONE_BY_ONE = (
    "clients run one by one, which is slower: DebertaV2ForSequenceClassification: "
    "deberta.encoder.layer.0.attention.self.query_proj does not get its input by rows (4 such layers)"
)
EXPERTS = (
    "no adapter for weights that are not layers of their own: model.layers.*.mlp.gate.weight, "
    "model.layers.*.mlp.experts.gate_up_proj, model.layers.*.mlp.experts.down_proj"
)
SHORT = (
    "task.languages=[eng,yor]", "task.clients_per_language=40", "task.clients_kept=2", "methods=[base,lora]",
    "budgets=[2]", "base.rounds=1", "base.cohort=2", "strategy.cohort=2", "decoding.max_test=1",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [("DeBERTa-v2, v3", "classification", ONE_BY_ONE), ("Mixtral", "generation", EXPERTS)],
    ids=["one by one", "experts"],
)
def test_plan_events_and_report_say_once_what_there_is_to_know(
    name: str, kind: TaskKind, said: str, benches: Mapping[TaskKind, Bench], tmp_path: Path
) -> None:
    folder = folder_of(named(name), benches[kind], tmp_path / "model")
    exp = (talk if kind == "generation" else tiny)(tmp_path, *SHORT, f"model={folder}")
    sentence = f"{said[:1].upper()}{said[1:]}."
    assert sentence in make_plan(exp).notes
    events: list[dict] = []
    run = run_tiny(exp, events=events)
    assert [e["what"] for e in events if e["kind"] == "warning"] == [said]
    assert not run.failures.entries()
    for event in events:
        run.events.append(event)
    page = Path(report_of(run, tmp_path / "report")).read_text("utf-8")
    assert sentence in page
