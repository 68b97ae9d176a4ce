"""Where files are: a POSIX file system, or a store that fsspec knows; tried again while a failure may pass.

`LocalFiles` and `RemoteFiles` have the same methods, which `fedtailor.storage.files.Storage` documents. Paths are
full ones. They raise OSErrors; a failure that may pass has been tried again by then.
"""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from fedtailor.core.errors import StorageError, TailorError
from fedtailor.core.files import link_new, retry_local, sync, write_whole

T = TypeVar("T")

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


class LocalFiles:
    """Files of a POSIX file system."""

    def exists(self, full: str) -> bool:
        """Whether a file or folder is there."""
        return os.path.exists(full)

    def read(self, full: str) -> bytes:
        """Content of a file."""
        return retry_local(Path(full).read_bytes)

    def write(self, full: str, data: bytes, durable: bool = True) -> None:
        """Replaces a file as a whole; with ``durable`` it survives a power cut."""
        write_whole(full, data, os.replace, durable)

    def create(self, full: str, data: bytes, before_visible: Callable[[], None]) -> None:
        """Writes a file that is not there; of several processes exactly one succeeds."""

        def appear(temp: str, name: str) -> None:
            before_visible()
            link_new(temp, name)

        write_whole(full, data, appear)

    def write_new(self, full: str, data: bytes) -> None:
        """Writes a file under a name that nobody else uses; not durable before `flush`."""
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "xb") as file:
            file.write(data)

    def flush(self, files: Iterable[str], root: str) -> None:
        """Makes files survive a power cut, and their folders below ``root``."""
        files, top = list(files), Path(root)
        folders = {str(p) for file in files for p in Path(file).parents if p == top or top in p.parents}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(sync, files))
            list(pool.map(sync, sorted(folders, reverse=True)))

    def append(self, full: str, data: bytes) -> None:
        """Appends to a file."""
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "ab", buffering=0) as file:
            file.write(data)

    def download(self, full: str, target: Path) -> None:
        """Copies a file out of the storage."""
        shutil.copyfile(full, target)

    def upload(self, source: Path, full: str) -> None:
        """Copies a file into the storage."""
        os.makedirs(os.path.dirname(full), exist_ok=True)
        shutil.copyfile(source, full)

    def modified(self, full: str) -> float:
        """When a file was written last, in seconds since 1970."""
        return os.stat(full).st_mtime

    def size(self, full: str) -> int:
        """Bytes of a file or tree; files that go while they are counted do not count."""
        if not os.path.isdir(full):
            return os.stat(full).st_size
        total = 0
        for folder, _, names in os.walk(full):
            for name in names:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
        return total

    def names(self, full: str) -> Iterable[str]:
        """Names in a folder."""
        return os.listdir(full)

    def delete(self, full: str) -> None:
        """Deletes a file or tree; nothing happens if it is not there."""
        if os.path.isdir(full) and not os.path.islink(full):
            shutil.rmtree(full)
        else:
            Path(full).unlink(missing_ok=True)

    def move(self, old: str, new: str) -> None:
        """Moves a file or tree, at once."""
        os.makedirs(os.path.dirname(new), exist_ok=True)
        retry_local(lambda: os.rename(old, new))
        sync(os.path.dirname(new))
        sync(os.path.dirname(old))


class RemoteFiles:
    """Files of one store; on a store a write is durable and whole once it returns.

    Args:
        fs: fsspec file system; its listings are never trusted from memory.
        url: address of the store, for messages.
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

    def write(self, full: str, data: bytes, durable: bool = True) -> None:
        """Replaces a file."""
        retry_remote(lambda: self._put(full, data))

    def create(self, full: str, data: bytes, before_visible: Callable[[], None]) -> None:
        """Writes a file that is not there.

        No two writers ever write the same ``data``; so a file that is there with it is ours, and what was lost is the
        answer to an earlier try.

        Raises:
            FileExistsError: somebody else's is.
            StorageError: the store has no exclusive writes.
        """
        before_visible()
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

    def write_new(self, full: str, data: bytes) -> None:
        """Writes a file under a name that nobody else uses."""
        self.write(full, data)

    def flush(self, files: Iterable[str], root: str) -> None:
        """Nothing: what is written is durable."""

    def append(self, full: str, data: bytes) -> None:
        """Appends to a file by rewriting it."""
        self.write(full, (self._content(full) or b"") + data)

    def download(self, full: str, target: Path) -> None:
        """Copies a file to a local one."""
        retry_remote(lambda: self._fresh().get_file(full, str(target)))

    def upload(self, source: Path, full: str) -> None:
        """Copies a local file to the store."""

        def put() -> None:
            self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
            self._fs.put_file(str(source), full)

        retry_remote(put)

    def names(self, full: str) -> Iterable[str]:
        """Names in a folder."""
        return {
            str(n).rstrip("/").rsplit("/", 1)[-1] for n in retry_remote(lambda: self._fresh().ls(full, detail=False))
        }

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
