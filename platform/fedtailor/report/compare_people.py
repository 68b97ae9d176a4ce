"""Which clients a run has, told by content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedtailor.storage.run_folder import RunFolder


@dataclass(frozen=True)
class People:
    """The clients of one seed of a run.

    Args:
        hashes: client to the sha256 of its texts and labels.
        labels: class names in the order of their ids.
    """

    hashes: Mapping[str, str]
    labels: tuple[str, ...]


def people_of(run: RunFolder) -> dict[int, People]:
    """Seed to clients, for the seeds whose data artifact is still in the storage."""
    found = {}
    for seed in run.info()["config"]["seeds"]:
        manifest = run.manifest(seed)
        if manifest is not None:
            hashes = {str(client["id"]): str(client["sha256"]) for client in manifest["clients"]}
            found[seed] = People(hashes, tuple(manifest["labels"]))
    return found
