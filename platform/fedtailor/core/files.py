"""Files and folders written whole or not at all, so that they survive a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from fedtailor.core.errors import StorageError

T = TypeVar("T")

PAUSES = (0.05, 0.2, 0.8)
"""Seconds before each further try of `retry_local`."""

_PASSING = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file or folder to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def refuse_used(out: Path) -> None:
    """Keeps ``--out`` from mixing with what is there.

    Raises:
        StorageError: the folder is not empty.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is there already and not an empty folder")


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
            sync(path)
        if out.exists():
            out.rename(old)
        stage.rename(out)
        sync(out.parent)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        for leftover in (stage, old):
            if leftover.exists():
                shutil.rmtree(leftover)


def retry_local(action: Callable[[], T]) -> T:
    """Repeats an action that fails for a passing reason (busy, stale handle, timeout) for about a second."""
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return action()


def write_whole(full: str, data: bytes, rename: Callable[[str, str], None] = os.replace, durable: bool = True) -> None:
    """Writes a temporary file beside ``full`` and gives it its name when it is whole.

    Args:
        full: path of the file; missing folders are made.
        data: its content.
        rename: (temporary path, ``full``): `os.replace`, or `link_new` for a file that must be new.
        durable: fsync file and folders, so that it survives a power cut.
    """
    folder, name = os.path.split(full)
    new_folders = [str(p) for p in (Path(folder), *Path(folder).parents) if not p.exists()]
    os.makedirs(folder, exist_ok=True)
    temp = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        retry_local(lambda: _write(temp, data, durable))
        retry_local(lambda: rename(temp, full))
    finally:
        Path(temp).unlink(missing_ok=True)
    if durable:
        for changed in (folder, *(os.path.dirname(path) for path in new_folders)):
            sync(changed)


def link_new(temp: str, full: str) -> None:
    """Gives a temporary file its name; of several processes exactly one succeeds.

    Raises:
        FileExistsError: the name is taken.
    """
    try:
        os.link(temp, full)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if os.path.exists(full):
            raise FileExistsError(full) from None
        os.replace(temp, full)


def _write(path: str, data: bytes, durable: bool) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        if durable:
            os.fsync(file.fileno())
