"""Folders below ``artifacts/`` of a storage: made on this node, then published as a whole."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from fedtailor.models.folder import staged_folder
from fedtailor.runs.artifact_lock import lock
from fedtailor.runs.file_manifest import publish, published
from fedtailor.runs.node_cache import cache_folder, fetch, one_process
from fedtailor.runs.storage import Storage, join

ARTIFACTS = "artifacts"
Make = Callable[[Path], None]
"""Fills the empty folder that it is given."""
_log = logging.getLogger(__name__)


class Artifacts:
    """Whole folders, by name.

    Args:
        storage: local: folders are made in their place; else in this node's cache and then uploaded.
        owner: run id, shown to others who wait.
        on_wait: told, now and then, for whom this process waits.
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
            with lock(self.storage, path, self.owner, on_wait=self._on_wait):
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
