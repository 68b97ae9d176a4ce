"""Files of a run below one root, local or any fsspec store: whole files only, nothing half visible."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from fedtailor.core.errors import StorageError
from fedtailor.core.files import sync
from fedtailor.storage.backends import (
    MissingFileError,
    RemoteFiles,
    storage_errors,
    link_new,
    local_size,
    retry_local,
    publish,
)
from fedtailor.storage.provenance import scrub

__all__ = ["MissingFileError", "Storage", "storage_errors", "join", "safe_path"]

Names = list[str]

_PASSWORD = re.compile(r"://[^/@:]+:[^@]*@")

# Parts without slash, backslash or control characters that are neither "." nor "..".
_SAFE = re.compile(r"(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]+(?:/(?!\.{1,2}(?:/|$))[^/\\\x00-\x1f]+)*")


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
        try:
            fs, root = url_to_fs(self.url)
        except (ValueError, ImportError) as error:
            raise StorageError(f"'storage' = {self.url!r}: {error}") from error
        self._root = str(root).rstrip("/")
        self.is_local = isinstance(fs, LocalFileSystem)
        self._remote = RemoteFiles(fs, self.url)

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
        full = self.full(path)
        with storage_errors(f"looking for {full}"):
            return os.path.exists(full) if self.is_local else self._remote.exists(full)

    def read_bytes(self, path: str) -> bytes:
        """Content of a file.

        Raises:
            MissingFileError: there is none.
        """
        full = self.full(path)
        with storage_errors(f"reading {full}"):
            return retry_local(Path(full).read_bytes) if self.is_local else self._remote.read(full)

    def write_bytes(self, path: str, data: bytes, durable: bool = True) -> None:
        """Replaces a file as a whole; afterwards it survives a power cut, unless ``durable`` is False."""
        full = self.full(path)
        with storage_errors(f"writing {full}"):
            if self.is_local:
                publish(full, data, os.replace, durable)
            else:
                self._remote.write(full, data)

    def create(self, path: str, data: bytes, before_visible: Callable[[], None] = lambda: None) -> bool:
        """Writes a file only if there is none; of several writers exactly one gets True.

        Args:
            data: something that no other writer would write; it tells whose file it is.
            before_visible: called when the data is written and the name is not there yet.

        Raises:
            StorageError: also if the store has no exclusive writes.
        """
        full = self.full(path)

        def appear(temp: str, name: str) -> None:
            before_visible()
            link_new(temp, name)

        with storage_errors(f"writing {full}"):
            try:
                if self.is_local:
                    publish(full, data, appear, durable=True)
                else:
                    before_visible()
                    self._remote.create(full, data)
            except FileExistsError:
                return False
        return True

    def write_new(self, path: str, data: bytes) -> None:
        """Writes a file under a name that nobody else uses; not durable before `flush`."""
        full = self.full(path)
        with storage_errors(f"writing {full}"):
            if not self.is_local:
                self._remote.write(full, data)
                return
            os.makedirs(os.path.dirname(full), exist_ok=True)
            with open(full, "xb") as file:
                file.write(data)

    def flush(self, paths: Iterable[str]) -> None:
        """Makes files that were written with `write_new` survive a power cut, and the folders they are in."""
        if not self.is_local:
            return
        files = [self.full(path) for path in paths]
        folders = {str(parent) for file in files for parent in Path(file).parents if self._below_root(parent)}
        with storage_errors(f"writing {self._root}"), ThreadPoolExecutor(8) as pool:
            list(pool.map(sync, files))
            list(pool.map(sync, sorted(folders, reverse=True)))

    def append(self, path: str, text: str) -> None:
        """Appends text to a file (on object stores by rewriting it)."""
        full = self.full(path)
        with storage_errors(f"writing {full}"):
            if self.is_local:
                os.makedirs(os.path.dirname(full), exist_ok=True)
                with open(full, "ab", buffering=0) as file:
                    file.write(text.encode())
            else:
                old = self.read_bytes(path) if self.exists(path) else b""
                self._remote.write(full, old + text.encode())

    def download(self, path: str, target: Path) -> None:
        """Copies a file to one outside of the storage, in pieces."""
        full = self.full(path)
        with storage_errors(f"copying {full} to {target}"):
            self._remote.download(full, target)

    def upload(self, source: Path, path: str) -> None:
        """Copies a file into the storage, in pieces; whole at once on object stores only."""
        full = self.full(path)
        with storage_errors(f"copying {source} to {full}"):
            self._remote.upload(source, full)

    def modified(self, path: str) -> float | None:
        """When a file was written last, by the store's clock, in seconds since 1970; None without a file."""
        full = self.full(path)
        with storage_errors(f"looking at {full}"):
            try:
                return os.stat(full).st_mtime if self.is_local else self._remote.modified(full)
            except FileNotFoundError:
                return None

    def size(self, path: str) -> int:
        """Bytes of a file or of all files in a folder; 0 where there is nothing."""
        full = self.full(path)
        with storage_errors(f"looking at {full}"):
            try:
                return local_size(full) if self.is_local else self._remote.size(full)
            except FileNotFoundError:
                return 0

    def list(self, path: str = "") -> Names:
        """Names in a folder, sorted; empty if there is no such folder."""
        full = self.full(path)
        with storage_errors(f"listing {full}"):
            try:
                return sorted(os.listdir(full) if self.is_local else self._remote.names(full))
            except FileNotFoundError:
                return []

    def delete(self, path: str) -> None:
        """Deletes a file or a whole tree; nothing happens if it is not there."""
        full = self.full(path)
        with storage_errors(f"deleting {full}"):
            if not self.is_local:
                self._remote.delete(full)
            elif os.path.isdir(full) and not os.path.islink(full):
                shutil.rmtree(full)
            else:
                Path(full).unlink(missing_ok=True)

    def move(self, source: str, target: str) -> None:
        """Moves a file or tree to a name that is not in use; atomic on local files only."""
        old, new = self.full(source), self.full(target)
        with storage_errors(f"moving {old} to {new}"):
            if self.is_local:
                os.makedirs(os.path.dirname(new), exist_ok=True)
                retry_local(lambda: os.rename(old, new))
                sync(os.path.dirname(new))
                sync(os.path.dirname(old))
                return
            self._remote.move(old, new)

    def read_json(self, path: str) -> Any:
        """Content of a JSON file.

        Raises:
            MissingFileError: there is none.
            StorageError: not JSON.
        """
        try:
            return json.loads(self.read_bytes(path))
        except ValueError as error:
            raise StorageError(f"{self.full(path)} is not JSON: {error}") from error

    def write_json(self, path: str, value: Mapping[str, Any]) -> None:
        """Replaces a JSON file as a whole."""
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        self.write_bytes(path, f"{text}\n".encode())

    def _below_root(self, folder: Path) -> bool:
        return folder == Path(self._root) or Path(self._root) in folder.parents
