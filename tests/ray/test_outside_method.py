"""A method of the user's own package runs on a cluster as it does here."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from outside import REFERENCE, write_package
from tiny import open_run, run_tiny, tiny

from actors.driver_actor import run_on_driver
from fedtailor.core import outside
from fedtailor.experiment import launch
from fedtailor.methods import METHODS, external
from fedtailor.storage.digest import digest

pytestmark = pytest.mark.ray


def test_driver_and_workers_import_it_and_agree_with_a_serial_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(write_package(tmp_path / "src")))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert str(tmp_path) not in os.environ.get("PYTHONPATH", "")
    small = ("base.name=none", "budgets=[1]", f"methods=[base,{REFERENCE}]", "mine.batch_size=16", "mine.epochs=1")
    try:
        serial = run_tiny(tiny(tmp_path / "serial", *small))
        exp = tiny(tmp_path / "ray", *small, "engine.backend=ray", "engine.actors=2", "engine.num_cpus=0.5")
        run = open_run(exp)
        launch.launch(run_on_driver, run, exp, lambda event: None, lambda: False)
        assert digest(run.storage, "run") == digest(serial.storage, "run")
    finally:
        METHODS.pop("mine", None)
        external._allowed.clear()
        outside._packages.clear()
        for name in ("mypkg", "mypkg.mine"):
            sys.modules.pop(name, None)
