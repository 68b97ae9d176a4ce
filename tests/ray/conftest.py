"""One local Ray cluster per test file; the fake worker's folder is on its processes' import path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:
    sys.path.append(HERE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    from actors.session import ensure_ray

    patch = pytest.MonkeyPatch()
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [HERE, os.environ.get("PYTHONPATH", "")])))
    session = ensure_ray()
    assert session.started
    yield
    session.close()
    patch.undo()
