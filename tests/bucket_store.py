"""``bucket://``: an object store for tests. Its objects are files, so that other processes see them too.

As on a real store there is no rename, no half object, and exclusive writes. What is read is logged in
``$BUCKET_LOG``, one path a line; ``BUCKET_KILL=<part of a path>`` kills the process that reads it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractFileSystem


class BucketFileSystem(AbstractFileSystem):  # type: ignore[misc]
    protocol = "bucket"
    cachable = False
    refused: ClassVar[deque[Exception]] = deque()
    """Raised by the next calls, before they do anything."""
    lost: ClassVar[deque[Exception]] = deque()
    """Raised by the next writes, after they were done."""

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return str(path).removeprefix("bucket://").rstrip("/")

    def _call(self) -> None:
        if self.refused:
            raise self.refused.popleft()

    def _read(self, path: str) -> bytes:
        self._call()
        if (part := os.environ.get("BUCKET_KILL")) and part in path:
            os.kill(os.getpid(), signal.SIGKILL)
        data = Path(path).read_bytes()
        if log := os.environ.get("BUCKET_LOG"):
            with open(log, "a") as file:
                file.write(f"{path}\n")
        return data

    def _write(self, path: str, data: bytes, appear: Callable[[str, str], None]) -> None:
        self._call()
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        temp = Path(path).parent / f".tmp-{secrets.token_hex(4)}"
        temp.write_bytes(data)
        try:
            appear(str(temp), path)
        finally:
            temp.unlink(missing_ok=True)
        if self.lost:
            raise self.lost.popleft()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **kwargs: Any) -> bytes:
        return self._read(self._strip_protocol(path))

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        Path(lpath).write_bytes(self._read(self._strip_protocol(rpath)))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **kwargs: Any) -> None:
        self._write(self._strip_protocol(path), value, os.link if mode == "create" else os.replace)

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self._write(self._strip_protocol(rpath), Path(lpath).read_bytes(), os.replace)

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        self._call()
        name = self._strip_protocol(path)
        kind = "directory" if os.path.isdir(name) else "file"
        return {"name": name, "size": os.stat(name).st_size if kind == "file" else 0, "type": kind}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> Any:
        self._call()
        folder = Path(self._strip_protocol(path))
        names = [str(folder)] if folder.is_file() else sorted(f"{folder}/{name}" for name in os.listdir(folder))
        return [self.info(name) for name in names] if detail else names

    def rm_file(self, path: str) -> None:
        self._call()
        os.unlink(self._strip_protocol(path))

    def rm(self, path: Any, recursive: bool = False, maxdepth: Any = None) -> None:
        self._call()
        shutil.rmtree(self._strip_protocol(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._call()

    def modified(self, path: str) -> datetime:
        return datetime.fromtimestamp(os.stat(self._strip_protocol(path)).st_mtime, UTC)


fsspec.register_implementation("bucket", BucketFileSystem, clobber=True)


def reads(log: Path) -> list[str]:
    """Names of what was read, without folders."""
    return [Path(line).name for line in log.read_text().splitlines()] if log.exists() else []
