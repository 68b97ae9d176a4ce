"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``out`` that takes its place, flushed to disk, if the block succeeds.

    An existing ``out`` is replaced as a whole; readers see the old folder, or (for the moment between two
    renames) none, or the new one, never a mixture. If the block fails, ``out`` is as it was.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex
    stage, old = out.parent / f".{out.name}.{unique}.new", out.parent / f".{out.name}.{unique}.old"
    stage.mkdir()
    try:
        yield stage
        for path in [*stage.rglob("*"), stage]:
            _flush(path)
        if out.exists():
            out.rename(old)
        stage.rename(out)
        _flush(out.parent)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        for leftover in (stage, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
