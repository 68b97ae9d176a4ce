"""Files of a run below one root, local or any fsspec store: whole files only, nothing half visible."""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fedtailor.core.errors import StorageError, reported_as
from fedtailor.storage.backends import LocalFiles, RemoteFiles, fresh, kind_of, retry
from fedtailor.storage.provenance import scrub

T = TypeVar("T")
Names = list[str]
_FULL, _FORBIDDEN = {errno.ENOSPC, errno.EDQUOT}, {errno.EROFS, errno.EACCES, errno.EPERM}
_PASSWORD = re.compile(r"://[^/@:]+:[^@]*@")

# Parts without slash, backslash or control characters that are neither "." nor "..".
_SAFE = re.compile(r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]+(?:/(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]+)*")


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


def safe_path(path: str) -> str:
    """Returns a relative path unchanged if it cannot leave its root.

    Raises:
        StorageError: absolute, empty, with ``..``, a backslash or a control character.
    """
    if not _SAFE.fullmatch(path):
        raise StorageError(f"unsafe file name {path!r}: it must be relative, without '..' and '\\'")
    return path


def join(*parts: str) -> str:
    """Joins path parts with ``/``."""
    return "/".join(part.strip("/") for part in parts if part)


class Storage:
    """Whole-file access below a root. All paths are relative to it and use ``/``.

    Args:
        url: local folder, ``memory://name``, or any other fsspec URL.

    Raises:
        StorageError: (also from every method) with the path and the reason in plain words.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url)
        if _PASSWORD.search(self.url):
            raise StorageError(
                f"'storage' = {scrub(self.url)}: a password in an address would end up in process lists and logs; give "
                "it as the store's own variables (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY) or configuration file"
            )
        with reported_as(StorageError, f"'storage' = {self.url!r}", ValueError, ImportError):
            fs, root = url_to_fs(self.url)
        self._root = str(root).rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)
        self._fs = fs
        self._files = LocalFiles() if self.is_local else RemoteFiles(fs, self.url)

    @property
    def address(self) -> str:
        """The URL, or the absolute path of a local folder: the same place from any working directory."""
        return self._root if self.is_local else self.url

    def full(self, path: str = "") -> str:
        """The path as the file system knows it."""
        return f"{self._root}/{safe_path(path)}" if path else self._root

    def local_path(self, path: str = "") -> Path:
        """The path as a local one.

        Raises:
            StorageError: the storage is not local.
        """
        if not self.is_local:
            raise StorageError(f"{self.url} is not a local folder")
        return Path(self.full(path))

    def exists(self, path: str) -> bool:
        """Whether a file or folder is there."""
        return self._look("looking for", path, lambda fs, full: kind_of(fs, full) is not None)

    def read_bytes(self, path: str) -> bytes:
        """Content of a file.

        Raises:
            MissingFileError: there is none.
        """
        return self._look("reading", path, lambda fs, full: bytes(fs.cat_file(full)))

    def write_bytes(self, path: str, data: bytes, durable: bool = True) -> None:
        """Replaces a file as a whole; it survives a power cut when this returns, without ``durable`` after `flush`."""
        self._do("writing", path, lambda full: self._files.write(full, data, durable))

    def create(self, path: str, data: bytes, before_visible: Callable[[], None] = lambda: None) -> bool:
        """Writes a file only if there is none; of several writers exactly one gets True.

        Args:
            path: path of the file.
            data: something that no other writer would write; it tells whose file it is.
            before_visible: called when the data is written and the name is not there yet.

        Raises:
            StorageError: also if the store has no exclusive writes.
        """

        def create(full: str) -> bool:
            with suppress(FileExistsError):
                self._files.create(full, data, before_visible)
                return True
            return False

        return self._do("writing", path, create)

    def flush(self, paths: Iterable[str]) -> None:
        """Makes files that were written without ``durable`` survive a power cut, and the folders they are in."""
        self._do("writing", "", lambda root: self._files.flush([self.full(path) for path in paths], root))

    def append(self, path: str, text: str) -> None:
        """Appends text to a file (on object stores by rewriting it)."""
        self._do("writing", path, lambda full: self._files.append(full, text.encode()))

    def download(self, path: str, target: Path) -> None:
        """Copies a file to one outside of the storage, in pieces."""
        self._look(f"filling {target} from", path, lambda fs, full: fs.get_file(full, str(target)))

    def upload(self, source: Path, path: str) -> None:
        """Copies a file into the storage, in pieces; whole at once on object stores only."""

        def put(fs: Any, full: str) -> None:
            fs.makedirs(os.path.dirname(full), exist_ok=True)
            fs.put_file(str(source), full)

        self._look(f"copying {source} to", path, put)

    def modified(self, path: str) -> float | None:
        """When a file was written last, by the store's clock, in seconds since 1970; None without a file."""
        with suppress(MissingFileError):
            return self._look("looking at", path, lambda fs, full: float(fs.modified(full).timestamp()))
        return None

    def size(self, path: str) -> int:
        """Bytes of a file or of all files in a folder; 0 where there is nothing, or no longer."""
        found = self._look("looking at", path, lambda fs, full: fs.find(full, detail=True))
        return sum(int(info.get("size") or 0) for info in found.values())

    def list(self, path: str = "") -> Names:
        """Names in a folder, sorted; empty if there is no such folder."""
        with suppress(MissingFileError):
            found = self._look("listing", path, lambda fs, full: fs.ls(full, detail=False))
            return sorted({str(name).rstrip("/").rsplit("/", 1)[-1] for name in found})
        return []

    def delete(self, path: str) -> None:
        """Deletes a file or a whole tree; nothing happens if it is not there."""
        self._do("deleting", path, self._files.delete)

    def move(self, source: str, target: str) -> None:
        """Moves a file or tree to a name that is not in use; atomic on local files only."""
        old = self.full(source)
        self._do(f"moving {old} to", target, lambda new: self._files.move(old, new))

    def read_json(self, path: str) -> Any:
        """Content of a JSON file.

        Raises:
            MissingFileError: there is none.
            StorageError: not JSON.
        """
        with reported_as(StorageError, f"{self.full(path)} is not JSON", ValueError):
            return json.loads(self.read_bytes(path))

    def write_json(self, path: str, value: Mapping[str, Any]) -> None:
        """Replaces a JSON file as a whole."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(path, f"{text}\n".encode())

    def _look(self, doing: str, path: str, action: Callable[[Any, str], T]) -> T:
        """Repeatable work of fsspec; listings are never taken from its memory."""
        return self._do(doing, path, lambda full: retry(lambda: action(fresh(self._fs), full)))

    def _do(self, doing: str, path: str, action: Callable[[str], T]) -> T:
        full = self.full(path)
        with storage_errors(f"{doing} {full}"):
            return action(full)
