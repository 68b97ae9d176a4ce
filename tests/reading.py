"""What the clients of a prepared task hold, read back from its files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import numpy.typing as npt

from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Split
from fedtailor.tasks.store import TaskData, cells
from fedtailor.tasks.task import prepare


def texts(data: TaskData, client: str, split: Split) -> tuple[list[str], npt.NDArray[np.int64]]:
    """A client's texts (of a pair the first one) or instructions, and their labels, (n,)."""
    rows = data.rows_of(client, split)
    return cells(data.batches, "text", rows), np.array(cells(data.batches, "label", rows), dtype=np.int64)


def pairs(data: TaskData, client: str, split: Split) -> list[str] | None:
    """The second texts, or the responses, in the order of `texts`; None where texts are single."""
    return cells(data.batches, "pair", data.rows_of(client, split)) if data.paired else None


def history(data: TaskData, client: str, split: Split) -> list[str | None]:
    """The turns before each instruction in the order of `texts`: JSON, or None where it is the first."""
    return cells(data.batches, "history", data.rows_of(client, split))


def fingerprint(cfg: TaskConfig, seed: int) -> str:
    """The hash of the task's content."""
    with TemporaryDirectory() as folder:
        return prepare(cfg, seed, Path(folder)).hash
