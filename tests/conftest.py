"""Settings of every test: one thread, no network, toy surroundings importable, groups for several workers."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it in its workers: tables would be narrower than in a pipe
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests of the cluster that all share come last, when no other one will be started."""
    items.sort(key=lambda item: "cluster" in getattr(item, "fixturenames", ()))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who plays what with ``-n 2``: at any time there is one Ray cluster, and costly fixtures are made once.

    Files with tests that start Ray are played one after the other by one worker: several clusters would want the same
    ports. Other files are kept whole, since their fixtures are whole runs, but for the notebooks, which need none.
    (``--dist loadgroup``, which reads marks, finds none with pytest-xdist 3.8 and pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByCost(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if starts_ray(config.rootpath / file):
                return "ray"
            return nodeid if file.endswith("test_notebooks.py") else file

    return ByCost(config, log)


@cache
def starts_ray(file: Path) -> bool:
    return "pytest.mark.ray" in file.read_text("utf-8")
