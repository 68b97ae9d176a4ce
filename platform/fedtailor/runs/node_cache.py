"""A node's own copies of what a storage holds: downloaded once per node, verified, shared by its processes."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from fedtailor.core.errors import StorageError
from fedtailor.core.messages import StageSpec
from fedtailor.models.folder import staged_folder
from fedtailor.runs.file_manifest import Files, difference, read_manifest
from fedtailor.runs.storage import MissingFileError, Storage, explained, join

VARIABLE = "FEDTAILOR_CACHE"
RESOLVER = "fedtailor.runs.node_cache:on_this_node"
"""What `StageSpec.resolver` is for stages whose folders are in a storage."""
_AT_ONCE, _TRIES = 4, 2
Stamp = tuple[tuple[str, int, int, int], ...]
_verified: dict[Path, tuple[Files, Stamp]] = {}
"""What this process has hashed: not again while sizes, times and inodes stay."""


def cache_folder(storage: Storage) -> Path:
    """This node's folder for a storage: below ``$FEDTAILOR_CACHE``, else ``~/.cache/fedtailor``."""
    root = os.environ.get(VARIABLE)
    base = Path(root).expanduser() if root else Path.home() / ".cache" / "fedtailor"
    return base.absolute() / hashlib.sha256(storage.address.encode()).hexdigest()[:16]


def fetch(storage: Storage, path: str) -> Path:
    """A folder of the storage as one of this node: of a local storage itself, else a verified copy.

    Of several processes of a node one downloads and the others wait; one that is killed leaves nothing that
    another would use.

    Args:
        storage: where the folder was published.
        path: e.g. ``artifacts/model-0123``.

    Raises:
        MissingFileError: the folder was not published; a local storage that is not on this node.
        StorageError: the store fails, the copy cannot be written, or a file is damaged at its source (names it).
    """
    if storage.is_local:
        return _local(storage, path)
    files, target = read_manifest(storage, path), cache_folder(storage) / path
    if _intact(target, files):
        return target
    with explained(f"filling the node's cache {target} (below ${VARIABLE})"), one_process(target):
        if _intact(target, files):
            return target
        for _ in range(_TRIES):
            wrong = _download(storage, path, files, target)
            if wrong is None:
                return target
    raise StorageError(f"{storage.full(path)} is damaged in {storage.url}: {wrong}; delete the folder to make it anew")


def on_this_node(spec: StageSpec) -> StageSpec:
    """The spec with folders of this node in place of names in its storage.

    Raises:
        StorageError: see `fetch`.
    """
    storage = Storage(spec.storage)
    return replace(
        spec,
        model_dir=str(fetch(storage, spec.model_dir)),
        data_dir=str(fetch(storage, spec.data_dir)),
        cache_dir=None if spec.cache_dir is None else str(_features(storage, spec)),
        storage="",
        resolver="",
    )


@contextmanager
def one_process(target: Path) -> Iterator[None]:
    """Lets one process of this node at a time write ``target``, and clears what killed ones left beside it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.parent / f".{target.name}.lock"):
        for leftover in target.parent.glob(f".{target.name}.*.new"):
            shutil.rmtree(leftover)
        yield


def _local(storage: Storage, path: str) -> Path:
    folder = storage.local_path(path)
    if not folder.is_dir():
        raise MissingFileError(
            f"{folder} is not on {platform.node()}: on several nodes 'storage' must be a folder that they share, "
            "or an object store (s3://..., gs://...)"
        )
    return folder


def _features(storage: Storage, spec: StageSpec) -> Path:
    """Features stay on the node; they belong to the very bytes of the model."""
    assert spec.cache_dir is not None
    if storage.is_local:
        return storage.local_path(spec.cache_dir)
    model = json.dumps(read_manifest(storage, spec.model_dir), sort_keys=True)
    return cache_folder(storage) / f"{spec.cache_dir}-{hashlib.sha256(model.encode()).hexdigest()[:16]}"


def _download(storage: Storage, path: str, files: Files, target: Path) -> str | None:
    """Replaces the copy as a whole; returns what is wrong with the files that came, and then changes nothing."""

    def one(name: str, stage: Path) -> None:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        storage.download(join(path, name), stage / name)

    try:
        with staged_folder(target) as stage:
            with ThreadPoolExecutor(_AT_ONCE) as pool:
                list(pool.map(lambda name: one(name, stage), files))
            if wrong := difference(stage, files):
                raise _WrongCopyError(wrong)
    except _WrongCopyError as error:
        return str(error)
    _verified[target] = files, _stamp(target)
    return None


def _intact(target: Path, files: Files) -> bool:
    if not target.is_dir():
        return False
    stamp = _stamp(target)
    if _verified.get(target) == (files, stamp):
        return True
    if difference(target, files) is not None:
        return False
    _verified[target] = files, stamp
    return True


def _stamp(folder: Path) -> Stamp:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple((str(p), s.st_size, s.st_mtime_ns, s.st_ino) for p in paths for s in [p.stat()])


class _WrongCopyError(Exception):
    """What came is not what the manifest says."""
