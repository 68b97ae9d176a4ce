"""What the clients of a prepared task hold, read back from its files."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Split
from fedtailor.tasks.store import TaskData, cells
from fedtailor.tasks.task import prepare


def history(data: TaskData, client: str, split: Split) -> list[str | None]:
    """The turns before each instruction in the order of `TaskData.texts`: JSON, or None where it is the first."""
    return cells(data.batches, "history", data.rows_of(client, split))


def fingerprint(cfg: TaskConfig, seed: int) -> str:
    """The hash of the task's content."""
    with TemporaryDirectory() as folder:
        return prepare(cfg, seed, Path(folder)).hash
