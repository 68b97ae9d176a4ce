"""One local Ray cluster for all tests that need not break it; this folder is on its processes' import path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from actors.session import RaySession

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)


_running: list[RaySession] = []


@pytest.fixture(scope="session")
def cluster() -> None:
    """As a run starts it, but with two CPUs on any machine, and values are sent every half second, not every ten."""
    from actors.session import ensure_ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")])))
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        patch.setattr(os, "cpu_count", lambda: 2)
        _running.append(ensure_ray())
    assert _running[-1].started


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Function | None) -> Iterator[None]:
    """Ends the cluster with its last test; those that are not about Ray may follow in the same process."""
    yield
    if nextitem is None or "cluster" not in nextitem.fixturenames:
        while _running:
            _running.pop().close()
