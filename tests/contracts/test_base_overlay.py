"""A base of which every client keeps a part: carried from the base stage into all later ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import run_tiny, tiny

from fedtailor.core.errors import Interrupted
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder

BASES = {
    "dept": ("base.name=dept", "dept.lr=2e-3", "dept.batch_size=16"),
    "feddpa": ("base.name=feddpa", "feddpa.lr=5e-3", "feddpa.batch_size=16"),
}
SMALL = ("methods=[base,lora,fedp2eft]", "budgets=[1]", "r_max=1", "base.rounds=2", "strategy.rounds=2")


@pytest.fixture(scope="module", params=sorted(BASES))
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(tiny(tmp_path_factory.mktemp(request.param), *BASES[request.param], *SMALL))


def test_the_clients_that_fell_back_to_the_initial_part_are_counted(finished: RunFolder) -> None:
    rows = finished.metrics()
    sampled = {c for _, c in rows[rows["stage"] == "base"][["round", "client"]].itertuples(index=False)}
    base = rows[(rows["stage"] == "personalise") & (rows["method"] == "base")]
    fallen = set(base[base["metric"] == "initial_overlay"]["client"])
    assert fallen == set(base["client"]) - sampled
    assert {c for c in fallen if c.startswith("unseen/")} == {c for c in base["client"] if c.startswith("unseen/")}
    assert sampled


def test_resumed_is_uninterrupted(finished: RunFolder, tmp_path: Path) -> None:
    name = finished.info()["config"]["base"]["name"]
    exp = tiny(tmp_path, *BASES[name], *SMALL)
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked % 9 == 0

    for _ in range(40):
        try:
            run = run_tiny(exp, should_stop=stop)
            break
        except Interrupted:
            continue
    assert digest(run.storage, "run") == digest(finished.storage, "run")


def test_features_are_those_of_the_clients_own_base(tmp_path: Path) -> None:
    """Two clients with the same texts differ in their features once their embeddings differ."""
    exp = tiny(tmp_path, *BASES["dept"], *SMALL, "dept.lr=5e-2", "methods=[fedp2eft]")
    plain = tiny(tmp_path, *SMALL, "base.name=none", "methods=[fedp2eft]")
    values: dict[str, Any] = {}
    for name, experiment in (("dept", exp), ("none", plain)):
        run_tiny(experiment, run_id=name)
    folders = sorted((tmp_path / "artifacts" / "features").iterdir())
    assert len(folders) == 2, "another base, other features"
    for folder in folders:
        values[folder.name] = {path.name: path.read_bytes() for path in folder.iterdir()}
    first, second = values.values()
    assert first.keys() == second.keys()
    assert all(first[key] != second[key] for key in first)
