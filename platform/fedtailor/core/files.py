"""Files and folders written whole or not at all, so that they survive a power cut."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtailor.core.errors import StorageError

CACHE = "FEDTAILOR_CACHE"
"""Environment variable with the folder that `cache_root` names."""

LONGEST_NAME = 96
"""Characters of the longest file name that `file_name` gives; encrypted file systems allow 143 bytes."""

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789-_.")


def file_name(name: str) -> str:
    """A file or folder name for any text, another one for every other text.

    Also where a file system ignores case or changes Unicode forms: all but lower-case letters, digits, ``-``, ``_`` and
    ``.`` is written ``%xx``, as is a dot at either end. What gets too long ends in a hash instead.

    >>> file_name("user7"), file_name("Ana"), file_name(".."), file_name("a/b")
    ('user7', '%41na', '%2e%2e', 'a%2fb')

    Raises:
        UnicodeEncodeError: half a surrogate pair, which readers of data refuse.
    """
    raw = name.encode()
    plain = "".join(chr(byte) if byte in _PLAIN else f"%{byte:02x}" for byte in raw)
    plain = re.sub(r"^\.|\.$", "%2e", plain) or "%"
    if len(plain) <= LONGEST_NAME:
        return plain
    return f"{plain[: LONGEST_NAME - 33]}~{hashlib.sha256(raw).hexdigest()[:32]}"


def cache_root() -> Path:
    """This node's folder for what can be made or fetched again: ``$FEDTAILOR_CACHE``, else ``~/.cache/fedtailor``."""
    root = os.environ.get(CACHE)
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "fedtailor").absolute()


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
