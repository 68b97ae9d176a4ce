"""Settings of every test: one thread, no network, toy surroundings importable, groups for several workers."""

from __future__ import annotations

import os
import re
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
    """Where several workers share the tests, those with Ray come first, since they take longest. The tests of the
    cluster that all share come after the others of their file, and in one process last: then no other one is started.
    """
    shared = {item: "cluster" in getattr(item, "fixturenames", ()) for item in items}
    items.sort(key=lambda item: shared[item])
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: ray_group(item.path) or "then all others")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Who plays what with ``-n 2``: at most two Ray clusters at a time, and costly fixtures are made once.

    Files that start Ray clusters of their own are played one after the other by one worker, those that share a cluster
    by another: together they are longer than all other tests. Other files are kept whole, since their fixtures are
    whole runs, but for the notebooks, which need none.
    (``--dist loadgroup``, which reads marks, finds none with pytest-xdist 3.8 and pytest 9.2.)
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByCost(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            if found := ray_group(config.rootpath / file):
                return found
            return nodeid if file.endswith("test_notebooks.py") else file

    config.option.loadscopereorder = False  # by number of tests, which says nothing about their length
    return ByCost(config, log)


@cache
def ray_group(file: Path) -> str:
    """Which tests with Ray a file belongs to; empty: it starts none."""
    text = file.read_text("utf-8")
    if "pytest.mark.ray" not in text:
        return ""
    return "ray 2, one cluster" if re.search(r"cluster: None|usefixtures\(\"cluster", text) else "ray 1, own clusters"
