"""How files come to be, move and go: on a POSIX file system, and on a store that fsspec knows.

A local file is written beside its name, flushed to the device and renamed. On a store a write is whole and durable
once it returns, and there is no rename. `LocalFiles` and `RemoteFiles` have the same methods, which
`fedtailor.storage.files.Storage` documents; paths are full ones. They raise OSErrors, and a failure that may pass has
been tried again by then.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from fedtailor.core.errors import StorageError, TailorError
from fedtailor.core.files import sync

T = TypeVar("T")
PAUSES = (0.2, 0.8, 2.0)
"""Seconds before each further try; stores' own libraries often retry below that."""

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK}

_LASTING = {
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP,
}  # fmt: skip

# Answers of a store, and errors of the caller's or of a store that lacks the operation: trying again cannot help.
_FINAL = (
    FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError,
    TailorError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError, ImportError,
)  # fmt: skip


def retry(action: Callable[[], T]) -> T:
    """Does one thing on a disk or store, up to ``len(PAUSES) + 1`` times.

    Args:
        action: must be safe to repeat: the answer to an earlier try may be what was lost.

    Raises:
        OSError: what the last try ended with; a library's own exception (botocore's, aiohttp's) becomes EIO.
    """
    pauses = list(PAUSES)
    while True:
        try:
            return action()
        except _FINAL:
            raise
        except OSError as error:
            if not pauses or error.errno in _LASTING:
                raise
        except Exception as error:  # each store's library has exceptions of its own
            if not pauses:
                raise OSError(errno.EIO, f"{type(error).__name__}: {error}") from error
        time.sleep(pauses.pop(0))


def fresh(fs: Any) -> Any:
    """The file system without what it remembers of listings."""
    fs.invalidate_cache()
    return fs


def kind_of(fs: Any, full: str) -> str | None:
    """``file``, ``directory`` or another type of fsspec's; None: nothing is there."""
    # fsspec's own `exists` and `isfile` take every failure for an absence.
    try:
        return str(fresh(fs).info(full)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


class LocalFiles:
    """Files of a POSIX file system."""

    def write(self, full: str, data: bytes, durable: bool) -> None:
        """Writes and renames."""
        self._write(full, data, durable, lambda temp: os.replace(temp, full))

    def create(self, full: str, data: bytes, before_visible: Callable[[], None]) -> None:
        """Writes and links, which fails if the name is taken."""

        def appear(temp: str) -> None:
            before_visible()
            try:
                os.link(temp, full)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                if os.path.exists(full):
                    raise FileExistsError(full) from None
                os.replace(temp, full)

        self._write(full, data, True, appear)

    def _write(self, full: str, data: bytes, durable: bool, appear: Callable[[str], None]) -> None:
        """Writes a temporary file beside ``full``, which then appears; with ``durable`` both survive a power cut."""

        def fill() -> None:
            with open(temp, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())

        folder, name = os.path.split(full)
        new_folders = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
        os.makedirs(folder, exist_ok=True)
        temp = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
        try:
            retry(fill)
            retry(lambda: appear(temp))
        finally:
            Path(temp).unlink(missing_ok=True)
        if durable:
            for changed in (Path(folder), *(path.parent for path in new_folders)):
                sync(changed)

    def flush(self, files: Iterable[str], root: str) -> None:
        """Files first, then their folders, the deepest first."""
        files, top = list(files), Path(root)
        folders = {str(p) for file in files for p in Path(file).parents if p == top or top in p.parents}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(sync, files))
            list(pool.map(sync, sorted(folders, reverse=True)))

    def append(self, full: str, data: bytes) -> None:
        """One write at the end."""
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "ab", buffering=0) as file:
            file.write(data)

    def delete(self, full: str) -> None:
        """A link is deleted, not what it points to."""
        if os.path.isdir(full) and not os.path.islink(full):
            shutil.rmtree(full)
        else:
            Path(full).unlink(missing_ok=True)

    def move(self, old: str, new: str) -> None:
        """At once."""
        os.makedirs(os.path.dirname(new), exist_ok=True)
        retry(lambda: os.rename(old, new))
        sync(os.path.dirname(new))
        sync(os.path.dirname(old))


class RemoteFiles:
    """Files of one store.

    Args:
        fs: fsspec file system.
        url: address of the store, for messages.
    """

    def __init__(self, fs: Any, url: str) -> None:
        self._fs, self._url = fs, url
        self._exclusive = False

    def write(self, full: str, data: bytes, durable: bool = True) -> None:
        """One request."""
        retry(lambda: self._put(full, data))

    def create(self, full: str, data: bytes, before_visible: Callable[[], None]) -> None:
        """One conditional request.

        No two writers ever write the same ``data``; so a file that is there with it is ours, and what was lost is the
        answer to an earlier try. Some servers know no conditions and ignore them: once per connection, a second write
        must fail.
        """
        before_visible()
        # Where `mode` is unknown it would be swallowed by **kwargs and the write would not be exclusive.
        if "mode" not in signature(self._fs.pipe_file).parameters:
            raise StorageError(f"{self._url}: the store has no exclusive writes, so no run can be locked on it")
        try:
            retry(lambda: self._put(full, data, mode="create"))
        except FileExistsError:
            if self._content(full) != data:
                raise
        if not self._exclusive:
            with suppress(FileExistsError):
                retry(lambda: self._put(full, data, mode="create"))
                raise StorageError(f"{self._url}: the store ignores exclusive writes, so no run can be locked on it")
            self._exclusive = True

    def flush(self, files: Iterable[str], root: str) -> None:
        """Nothing: what is written is durable."""

    def append(self, full: str, data: bytes) -> None:
        """By rewriting."""
        self.write(full, self._content(full) + data)

    def delete(self, full: str) -> None:
        """Object by object where the store wants it so."""

        def rm() -> None:
            kind = kind_of(self._fs, full)
            with suppress(FileNotFoundError):
                if kind == "file":
                    self._fs.rm_file(full)
                elif kind is not None:
                    self._fs.rm(full, recursive=True)

        retry(rm)

    def move(self, old: str, new: str) -> None:
        """File by file; the old ones go when all are there."""
        for name in self._tree(old):
            self.write(new + name[len(old) :], retry(partial(self._fs.cat_file, name)))
        self.delete(old)

    def _tree(self, full: str) -> Iterator[str]:
        # fsspec's own `find` leaves out what it fails to list, and then a move would lose it.
        for info in retry(lambda: fresh(self._fs).ls(full, detail=True)):
            if info["type"] != "directory":
                yield str(info["name"])
            elif str(info["name"]).rstrip("/") != full:  # a marker of the folder itself
                yield from self._tree(str(info["name"]).rstrip("/"))

    def _content(self, full: str) -> bytes:
        try:
            return bytes(retry(lambda: fresh(self._fs).cat_file(full)))
        except FileNotFoundError:
            return b""

    def _put(self, full: str, data: bytes, **how: str) -> None:
        self._fs.makedirs(full.rsplit("/", 1)[0], exist_ok=True)
        self._fs.pipe_file(full, data, **how)
