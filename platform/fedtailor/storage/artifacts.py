"""Artifacts: whole folders by name, made once per storage by one run, fetched and verified once per node.

Below ``artifacts/`` of a local storage a folder appears by one rename. On a store it is uploaded from this node's
cache, and ``FILES.json`` (its files with their hashes), written last, says that all are there. `fetch` downloads such a
folder once per node and verifies it; all processes of the node share the copy.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedtailor.core.errors import StorageError
from fedtailor.core.files import CACHE, cache_root, staged_folder
from fedtailor.core.messages import StageSpec
from fedtailor.storage.files import MissingFileError, Storage, join, safe_path, storage_errors
from fedtailor.storage.lock import Lock

ARTIFACTS, MANIFEST = "artifacts", "FILES.json"

Files = Mapping[str, str]
"""Path below the folder, with ``/``, to the sha256 of the content."""

Make = Callable[[Path], object]
"""Fills the empty folder that it is given."""

_AT_ONCE, _TRIES = 4, 2
_log = logging.getLogger(__name__)
_hashed: dict[tuple[int, ...], str] = {}
"""What this process has hashed, by device, inode, size and time: not again while these stay."""


class _WrongCopyError(Exception):
    """A copy is not what its manifest says: a clause that names the file."""


def _hashes(folder: Path) -> dict[str, str]:
    """All files of a local folder, sorted."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        status = path.stat()
        key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
        if key not in _hashed:
            with path.open("rb") as stream:
                _hashed[key] = hashlib.file_digest(stream, "sha256").hexdigest()
        files[path.relative_to(folder).as_posix()] = _hashed[key]
    return files


def _check(folder: Path, files: Files) -> None:
    present = _hashes(folder)
    for name in sorted({*files, *present}):
        if name not in present:
            raise _WrongCopyError(f"{name} is missing")
        if name not in files:
            raise _WrongCopyError(f"{name} does not belong there")
        if present[name] != files[name]:
            raise _WrongCopyError(f"{name} has sha256 {present[name][:12]}..., its manifest says {files[name][:12]}...")


def published(storage: Storage, path: str) -> bool:
    """Whether a folder is there as a whole."""
    return storage.local_path(path).is_dir() if storage.is_local else storage.exists(join(path, MANIFEST))


def publish(storage: Storage, path: str, folder: Path) -> None:
    """Copies a local folder to a store; whoever reads meanwhile finds the folder not there.

    The caller holds a lock of the folder, or is the only one that writes it.

    Raises:
        StorageError: the store failed; without its manifest, what was copied does not count.
    """
    files = _hashes(folder)
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


def cache_folder(storage: Storage) -> Path:
    """This node's folder for a storage: below ``$FEDTAILOR_CACHE``, else ``~/.cache/fedtailor``."""
    return cache_root() / hashlib.sha256(storage.address.encode()).hexdigest()[:16]


def fetch(storage: Storage, path: str) -> Path:
    """A folder of the storage as one of this node: of a local storage itself, else a verified copy.

    Of several processes of a node one downloads and the others wait; one that is killed leaves nothing that
    another would use.

    Args:
        storage: storage in which the folder was published.
        path: e.g. ``artifacts/model-0123``.

    Raises:
        MissingFileError: the folder was not published; a local storage that is not on this node.
        StorageError: the store fails, the copy cannot be written, or a file is damaged at its source (names it).
    """
    if storage.is_local:
        folder = storage.local_path(path)
        if not folder.is_dir():
            raise MissingFileError(
                f"{folder} is not on {platform.node()}: on several nodes 'storage' must be a folder that they share, "
                "or an object store (s3://..., gs://...)"
            )
        return folder
    files, target = read_manifest(storage, path), cache_folder(storage) / path
    if _intact(target, files):
        return target
    with storage_errors(f"filling the node's cache {target} (below ${CACHE})"), one_process(target):
        tries = 0
        while not _intact(target, files):
            try:
                _download(storage, path, files, target)
            except _WrongCopyError as wrong:
                tries += 1
                if tries == _TRIES:
                    damaged = f"{storage.full(path)} is damaged in {storage.url}: {wrong}"
                    raise StorageError(f"{damaged}; delete the folder to make it anew") from wrong
    return target


def on_this_node(spec: StageSpec) -> StageSpec:
    """The spec with folders of this node in place of names in its storage; unchanged where it names none.

    Raises:
        StorageError: see `fetch`.
    """
    if not spec.storage:
        return spec
    storage = Storage(spec.storage)
    return replace(
        spec,
        model_dir=str(fetch(storage, spec.model_dir)),
        data_dir=str(fetch(storage, spec.data_dir)),
        cache_dir=None if spec.cache_dir is None else str(_features(storage, spec)),
        storage="",
    )


@contextmanager
def one_process(target: Path) -> Iterator[None]:
    """Lets one process of this node at a time write ``target``, and clears what killed ones left beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        for leftover in target.parent.glob(f".{target.name}.*.new"):
            shutil.rmtree(leftover)
        yield


def _features(storage: Storage, spec: StageSpec) -> Path:
    """Features stay on the node; they belong to the very bytes of the model."""
    assert spec.cache_dir is not None
    if storage.is_local:
        return storage.local_path(spec.cache_dir)
    model = json.dumps(read_manifest(storage, spec.model_dir), sort_keys=True)
    return cache_folder(storage) / f"{spec.cache_dir}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def _download(storage: Storage, path: str, files: Files, target: Path) -> None:
    """Replaces the copy as a whole; a file that is not the one of the manifest changes nothing."""

    def one(name: str) -> None:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(join(path, name), stage / name)

    with staged_folder(target) as stage:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(one, files))
        _check(stage, files)


def _intact(target: Path, files: Files) -> bool:
    try:
        _check(target, files)
    except _WrongCopyError:
        return False
    return target.is_dir()


class Artifacts:
    """Whole folders, by name.

    Args:
        storage: local: folders are made in their place; else in this node's cache and then uploaded.
        owner: run id, shown to runs that wait.
        on_wait: called, now and then, with a sentence about the run that this process waits for.
    """

    def __init__(self, storage: Storage, owner: str, on_wait: Callable[[str], None] = _log.info) -> None:
        self.storage, self.owner, self._on_wait = storage, owner, on_wait
        self.folder = storage.local_path(ARTIFACTS) if storage.is_local else cache_folder(storage) / ARTIFACTS

    def ensure(self, name: str, make: Make) -> Path:
        """The folder on this node; made, by one run at a time, if nobody has.

        Raises:
            StorageError: the store failed. Whatever ``make`` raises; then nothing is left.
        """
        path = artifact_path(name)
        if self.storage.is_local:
            if not (self.folder / name).exists():
                self._make(name, make)
        elif not published(self.storage, path):
            with Lock(self.storage, path, self.owner, on_wait=self._on_wait):
                if not published(self.storage, path):
                    self.replace(name, make)
        return fetch(self.storage, path)

    def replace(self, name: str, make: Make) -> None:
        """Makes a folder anew; the caller is the only one that writes it."""
        self._make(name, make)
        if not self.storage.is_local:
            publish(self.storage, artifact_path(name), self.folder / name)

    def _make(self, name: str, make: Make) -> None:
        target = self.folder / name
        with nullcontext() if self.storage.is_local else one_process(target), staged_folder(target) as out:
            make(out)


def artifact_path(name: str) -> str:
    """Path of an artifact in its storage."""
    return join(ARTIFACTS, name)


def model_path(artifact: str) -> str:
    """Path of the model that a stage builds on: a base stage's, or an initial one."""
    return artifact_path(f"{artifact}/model" if artifact.startswith("base-") else artifact)
