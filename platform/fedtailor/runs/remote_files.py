"""Whole files on a store over the network, any that fsspec knows; calls are repeated while a failure may pass."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from fedtailor.core.errors import StorageError, TailorError

T = TypeVar("T")
PAUSES = (0.2, 0.8, 2.0)
"""Seconds before each further try; stores' own libraries often retry below that."""
_LASTING = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP,
}  # fmt: skip
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# Errors of the caller's or of a store that lacks the operation: trying again cannot help.
_MISTAKES = (TailorError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError)


def remotely(action: Callable[[], T]) -> T:
    """Does one thing on a store, up to ``len(PAUSES) + 1`` times.

    Args:
        action: must be safe to repeat: the answer to an earlier try may be what was lost.

    Raises:
        OSError: what the last try ended with; a library's own exception (botocore's, aiohttp's) becomes EIO.
    """
    for pause in PAUSES:
        try:
            return action()
        except (*_ANSWERS, *_MISTAKES):
            raise
        except OSError as error:
            if error.errno in _LASTING:
                raise
        except Exception:  # each store's library has exceptions of its own; the last try below lets one through
            pass
        time.sleep(pause)
    try:
        return action()
    except (OSError, *_MISTAKES):
        raise
    except Exception as error:
        raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error


class RemoteFiles:
    """Files of one store, by the paths that its file system knows.

    Args:
        fs: fsspec file system; its listings are never trusted from memory.
        url: for messages.
    """

    def __init__(self, fs: Any, url: str) -> None:
        self._fs, self._url = fs, url
        self._exclusive = False

    def exists(self, full: str) -> bool:
        """Whether a file or folder is there."""
        return remotely(lambda: self._kind(full) is not None)

    def read(self, full: str) -> bytes:
        """Content of a file."""
        return remotely(lambda: bytes(self._fresh().cat_file(full)))

    def write(self, full: str, data: bytes) -> None:
        """Replaces a file."""
        remotely(lambda: self._put(full, data))

    def create(self, full: str, data: bytes) -> None:
        """Writes a file that is not there.

        Args:
            data: no two writers ever write the same; so a file that is there with it is ours, and what was lost
                is the answer to an earlier try.

        Raises:
            FileExistsError: somebody else's is.
            StorageError: the store has no exclusive writes.
        """
        # Where `mode` is unknown it would be swallowed by **kwargs and the write would not be exclusive.
        if "mode" not in signature(self._fs.pipe_file).parameters:
            raise StorageError(f"{self._url}: the store has no exclusive writes, so no run can be locked on it")
        try:
            remotely(lambda: self._put(full, data, mode="create"))
        except FileExistsError:
            if self._content(full) != data:
                raise
        if not self._exclusive:
            self._check_exclusive(full, data)

    def download(self, full: str, target: Path) -> None:
        """Copies a file to a local one."""
        remotely(lambda: self._fresh().get_file(full, str(target)))

    def upload(self, source: Path, full: str) -> None:
        """Copies a local file to the store."""

        def put() -> None:
            self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(source), full)

        remotely(put)

    def names(self, full: str) -> set[str]:
        """Names in a folder."""
        return {str(n).rstrip("/").rsplit("/", 1)[-1] for n in remotely(lambda: self._fresh().ls(full, detail=False))}

    def delete(self, full: str) -> None:
        """Deletes a file or tree; nothing happens if it is not there."""

        def rm() -> None:
            kind = self._kind(full)
            with suppress(FileNotFoundError):
                if kind == "file":
                    self._fs.rm_file(full)
                elif kind is not None:
                    self._fs.rm(full, recursive=True)

        remotely(rm)

    def move(self, old: str, new: str) -> None:
        """Moves a file or tree, file by file."""
        for name in map(str, remotely(lambda: self._fresh().find(old))):
            self.write(new + name[len(old) :], self.read(name))
        self.delete(old)

    def modified(self, full: str) -> float:
        """When a file was written last, by the store's clock, in seconds since 1970."""
        return remotely(lambda: float(self._fresh().modified(full).timestamp()))

    def size(self, full: str) -> int:
        """Bytes of a file or of all files in a folder."""
        return remotely(lambda: int(self._fresh().du(full)))

    def _check_exclusive(self, full: str, data: bytes) -> None:
        """Some servers know no conditions and ignore them: once per connection, a second write must fail."""
        try:
            remotely(lambda: self._put(full, data, mode="create"))
        except FileExistsError:
            self._exclusive = True
            return
        raise StorageError(f"{self._url}: the store ignores exclusive writes, so no run can be locked on it")

    def _content(self, full: str) -> bytes | None:
        try:
            return self.read(full)
        except FileNotFoundError:
            return None

    def _kind(self, full: str) -> str | None:
        # fsspec's own `exists` and `isfile` take every failure for an absence.
        try:
            return str(self._fresh().info(full)["type"])
        except FileNotFoundError:
            return None

    def _put(self, full: str, data: bytes, **how: str) -> None:
        self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(full, data, **how)

    def _fresh(self) -> Any:
        self._fs.invalidate_cache()
        return self._fs
