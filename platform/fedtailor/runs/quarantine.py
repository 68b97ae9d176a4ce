"""Where rounds go that do not verify: moved aside with the reason, never loaded and never deleted."""

from __future__ import annotations

from fedtailor.runs.commit import folder
from fedtailor.runs.storage import Storage, join

QUARANTINE, REASON = "quarantine", "REASON.json"


def quarantine(storage: Storage, path: str, index: int, reason: str) -> str:
    """Moves a round of the log at ``path`` to ``quarantine/`` and returns where it is now."""
    taken = set(storage.list(join(path, QUARANTINE)))
    name = f"{index:06d}"
    number = 0
    while name in taken:
        number += 1
        name = f"{index:06d}-{number}"
    source, target = join(path, folder(index)), join(path, QUARANTINE, name)
    # Written before the move: a crash in between must not leave an entry without a reason.
    storage.write_json(join(source, REASON), {"round": index, "reason": reason})
    storage.move(source, target)
    return target


def sweep(storage: Storage, path: str) -> None:
    """Deletes temporary files that a killed writer left in a folder."""
    for name in storage.list(path):
        if name.startswith(".") and name.endswith(".tmp"):
            storage.delete(join(path, name))
