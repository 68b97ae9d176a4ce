"""What a pretraining keeps on disk until it is finished: prepared rows, and the newest state of the learner."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtailor.core.errors import StorageError
from fedtailor.core.files import staged_folder

STATE, TENSORS = "state.json", "learner.safetensors"

PREPARED = "prepared"


@dataclass(frozen=True)
class Position:
    """All of a pretraining's state but the tensors. With the seed, the step names every random stream.

    Args:
        step: updates made.
        drawn: rows read of each stream.
        loss_sum: of the steps since the newest measure.
        curve: measures so far.
    """

    step: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)
    loss_sum: float = 0.0
    curve: tuple[Mapping[str, Any], ...] = ()


def work_folder(out: Path) -> Path:
    """Where a pretraining works until ``out`` exists."""
    return out.parent / f"{out.name}.partial"


def save(work: Path, position: Position, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``checkpoint-STEP`` as a whole, then removes the older ones: a readable one is there at any time."""
    target = work / f"checkpoint-{position.step:08d}"
    with staged_folder(target) as stage:
        save_file(dict(tensors), stage / TENSORS)
        write_json(stage / STATE, asdict(position))
    for old in _folders(work):
        if old != target:
            shutil.rmtree(old)


def load(work: Path) -> tuple[Position, dict[str, Tensor]] | None:
    """The newest checkpoint; None if there is none.

    Raises:
        StorageError: it is damaged; names the file.
    """
    folders = _folders(work)
    if not folders:
        return None
    state = read_json(folders[-1] / STATE)
    try:
        tensors = load_file(folders[-1] / TENSORS)
    except (SafetensorError, OSError) as error:
        raise StorageError(f"{folders[-1] / TENSORS} is damaged: {error}; remove {folders[-1]} to go on") from error
    return Position(state["step"], state["drawn"], state["loss_sum"], tuple(state["curve"])), tensors


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON object, keys in the order given."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        StorageError: it is missing or damaged; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} is missing or damaged: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged: expected an object")
    return value


def _folders(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"))
