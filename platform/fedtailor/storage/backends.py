"""Whole, durable files on a POSIX file system, and operating system errors in plain words.

Whole files on a store over the network, any that fsspec knows; calls are repeated while a failure may pass.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from fedtailor.core.errors import StorageError, TailorError
from fedtailor.core.files import sync

T = TypeVar("T")

_FULL = {errno.ENOSPC, errno.EDQUOT}

_FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}

_PASSING = {errno.EIO, errno.EBUSY, errno.EAGAIN, errno.ESTALE, errno.ETIMEDOUT}

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}

_PAUSES = (0.05, 0.2, 0.8)


class MissingFileError(StorageError):
    """A file that should be read is not there."""


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
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


def retry_local(action: Callable[[], T]) -> T:
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


PAUSES = (0.2, 0.8, 2.0)
"""Seconds before each further try; stores' own libraries often retry below that."""

_LASTING = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP,
}  # fmt: skip

_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)

# Errors of the caller's or of a store that lacks the operation: trying again cannot help.
_MISTAKES = (TailorError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError)


def retry_remote(action: Callable[[], T]) -> T:
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
        return retry_remote(lambda: self._kind(full) is not None)

    def read(self, full: str) -> bytes:
        """Content of a file."""
        return retry_remote(lambda: bytes(self._fresh().cat_file(full)))

    def write(self, full: str, data: bytes) -> None:
        """Replaces a file."""
        retry_remote(lambda: self._put(full, data))

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
            retry_remote(lambda: self._put(full, data, mode="create"))
        except FileExistsError:
            if self._content(full) != data:
                raise
        if not self._exclusive:
            self._check_exclusive(full, data)

    def download(self, full: str, target: Path) -> None:
        """Copies a file to a local one."""
        retry_remote(lambda: self._fresh().get_file(full, str(target)))

    def upload(self, source: Path, full: str) -> None:
        """Copies a local file to the store."""

        def put() -> None:
            self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(source), full)

        retry_remote(put)

    def names(self, full: str) -> set[str]:
        """Names in a folder."""
        return {str(n).rstrip("/").rsplit("/", 1)[-1] for n in retry_remote(lambda: self._fresh().ls(full, detail=False))}

    def delete(self, full: str) -> None:
        """Deletes a file or tree; nothing happens if it is not there."""

        def rm() -> None:
            kind = self._kind(full)
            with suppress(FileNotFoundError):
                if kind == "file":
                    self._fs.rm_file(full)
                elif kind is not None:
                    self._fs.rm(full, recursive=True)

        retry_remote(rm)

    def move(self, old: str, new: str) -> None:
        """Moves a file or tree, file by file."""
        for name in map(str, retry_remote(lambda: self._fresh().find(old))):
            self.write(new + name[len(old) :], self.read(name))
        self.delete(old)

    def modified(self, full: str) -> float:
        """When a file was written last, by the store's clock, in seconds since 1970."""
        return retry_remote(lambda: float(self._fresh().modified(full).timestamp()))

    def size(self, full: str) -> int:
        """Bytes of a file or of all files in a folder."""
        return retry_remote(lambda: int(self._fresh().du(full)))

    def _check_exclusive(self, full: str, data: bytes) -> None:
        """Some servers know no conditions and ignore them: once per connection, a second write must fail."""
        try:
            retry_remote(lambda: self._put(full, data, mode="create"))
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
