"""Whole, durable files on a POSIX file system, and operating system errors in plain words."""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from fedtailor.core.durable import sync
from fedtailor.core.errors import StorageError

T = TypeVar("T")
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
_PASSING = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}
_PAUSES = (0.05, 0.2, 0.8)


class MissingFileError(StorageError):
    """A file that should be read is not there."""


@contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turns operating system errors into sentences.

    Args:
        doing: what was tried, with the path: ``writing runs/a/status.json``.

    Raises:
        StorageError: for any OSError inside.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise MissingFileError(f"{doing}: the file is missing") from error
    except OSError as error:
        if error.errno in _FULL:
            reason = "no space left on the device; nothing half-written is kept: free space and resume"
        elif error.errno in _FORBIDDEN:
            reason = f"not allowed ({error.strerror}); make the folder writable or choose another 'storage'"
        else:
            reason = f"{type(error).__name__}: {error}"
        raise StorageError(f"{doing}: {reason}") from error


def patiently(action: Callable[[], T]) -> T:
    """Repeats an action that fails for a passing reason (busy, stale handle, timeout) for about a second."""
    for pause in _PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            time.sleep(pause)
    return action()


def publish(full: str, data: bytes, rename: Callable[[str, str], None], durable: bool) -> None:
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
        patiently(lambda: _write(temp, data, durable))
        patiently(lambda: rename(temp, full))
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


def local_size(path: str) -> int:
    """Bytes of a file or tree; files that go while they are counted do not count.

    Raises:
        FileNotFoundError: there is nothing.
    """
    if not os.path.isdir(path):
        return os.stat(path).st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(folder, name)).st_size
    return total
