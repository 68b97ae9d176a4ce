"""What a process imports before it has anything to do: model classes in workers only, torch where numbers are.

The names are what costs: torch a second of CPU, the base class of transformers' models two more.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODELS = {"transformers.modeling_utils", "torch._dynamo", "accelerate"}
"""What comes with any of transformers' models."""
NUMBERS = {"torch", "transformers", "scipy", "pandas", "matplotlib"}
NEVER = {"peft", "datasets", "evaluate", "sklearn", "wandb", "nltk", "deepspeed", "matplotlib", "pandas", "ray"}
"""What a worker has no use for; Ray is imported by the actor around it."""

CASES = {
    "help": ("from fedtailor.cli import app; app(['--help'], standalone_mode=False)", NUMBERS | {"numpy", "ray"}),
    "status": ("import fedtailor.cli.status_views", NUMBERS | {"ray"}),
    "actors": ("import actors.driver_actor, actors.ray_pool", NUMBERS),
    "driver": ("import fedtailor.experiment.launch, fedtailor.experiment.prepare", MODELS | NEVER),
    "worker": ("import fedtailor.worker.worker as w; w.Worker()", NEVER),
}


@pytest.mark.parametrize("name", CASES)
def test_a_process_imports_only_what_it_needs(name: str) -> None:
    code, unwanted = CASES[name]
    told = f"{code}\nimport sys; print(*sorted(set({sorted(unwanted)}) & set(sys.modules)), sep='\\n', file=sys.stderr)"
    path = os.pathsep.join([str(ROOT / "platform"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", told], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []
