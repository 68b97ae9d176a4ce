"""What is on the device, so that it survives a power cut."""

from __future__ import annotations

import os


def sync(path: str | os.PathLike[str]) -> None:
    """Flushes a file or folder to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
