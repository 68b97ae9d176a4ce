"""``FILES.json``: the files of a published folder and their hashes. Written last, it is the mark that all are there.

Folders of a local storage have none: they appear by one rename.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtailor.core.errors import StorageError
from fedtailor.runs.storage import Storage, join, safe_path

MANIFEST = "FILES.json"
Files = Mapping[str, str]
"""Path below the folder, with ``/``, to the sha256 of the content."""


def describe(folder: Path) -> dict[str, str]:
    """All files of a local folder, sorted."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}


def difference(folder: Path, files: Files) -> str | None:
    """What is wrong with a local copy, in words that name the file; None if it is whole."""
    found = describe(folder) if folder.is_dir() else {}
    for name in sorted({*files, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in files:
            return f"{name} does not belong there"
        if found[name] != files[name]:
            return f"{name} has sha256 {found[name][:12]}..., its manifest says {files[name][:12]}..."
    return None


def published(storage: Storage, path: str) -> bool:
    """Whether a folder is there as a whole."""
    return storage.local_path(path).is_dir() if storage.is_local else storage.exists(join(path, MANIFEST))


def publish(storage: Storage, path: str, folder: Path) -> None:
    """Copies a local folder to a store; whoever reads meanwhile finds the folder not there.

    The caller holds a lock of the folder, or is the only one that writes it.

    Raises:
        StorageError: the store failed; without its manifest, what was copied does not count.
    """
    files = describe(folder)
    storage.delete(join(path, MANIFEST))
    for name in files:
        storage.upload(folder / name, join(path, name))
    storage.write_json(join(path, MANIFEST), {"files": files})


def read_manifest(storage: Storage, path: str) -> dict[str, str]:
    """The files of a published folder.

    Raises:
        MissingFileError: the folder was not published, or not wholly.
        StorageError: not a manifest, or one with names that lead out of the folder.
    """
    content: Any = storage.read_json(join(path, MANIFEST))
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(value, str) for value in files.values()):
        raise StorageError(f"{storage.full(join(path, MANIFEST))} is not a list of files")
    return {safe_path(name): value for name, value in files.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
