"""Settings of every test: one thread, no network, toy surroundings importable."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder that FEDTAILOR_DATA names; tests that need it are skipped aloud without it."""
    folder = os.environ.get("FEDTAILOR_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("FEDTAILOR_DATA does not name a folder: real data is not tested")
    return Path(folder)
