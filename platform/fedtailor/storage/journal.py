"""A run's line files: numbered entries, cut into pieces of bounded size, the oldest pieces given up in the open.

``events.jsonl`` is written; when it is full it becomes ``events.1.jsonl``, the next time ``events.2.jsonl`` and so
on, and only the newest pieces are kept. ``seq`` counts entries without a gap, over all pieces and over restarts: a
hole is a lost line, and the first number tells how many were given up. Order is by ``seq``; clocks may jump.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from fedtailor.storage.files import Storage, join
from fedtailor.storage.provenance import redact

LIMIT = 10 * 2**20
"""Bytes of a piece. A store that cannot append rewrites the piece for every line, so there it is `REMOTE_LIMIT`."""

REMOTE_LIMIT = 2**18

KEPT = 5
"""Full pieces that are kept beside the one that is written."""


class Journal:
    """Lines of one kind; one process writes at a time.

    Args:
        storage: storage of the run.
        run_id: the run's folder.
        name: ``events`` or ``failures``.
        limit: bytes of a piece.
        kept: full pieces to keep.
    """

    def __init__(self, storage: Storage, run_id: str, name: str, limit: int | None = None, kept: int = KEPT) -> None:
        self._storage, self._run_id, self._name, self._kept = storage, run_id, name, kept
        self._limit = limit or (LIMIT if storage.is_local else REMOTE_LIMIT)
        self._path = join(run_id, f"{name}.jsonl")
        self._seq: int | None = None
        self._size = 0

    def append(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Adds a line and returns it as written: `stamped`, with the next number, secrets hidden."""
        torn = self._catch_up()
        # An entry's own keys are ours (``key`` may be a stage's); what they hold may come from anywhere.
        content = stamp({key: redact(value) for key, value in entry.items()}, self._run_id, (self._seq or 0) + 1)
        line = ("\n" if torn else "") + json.dumps(content, ensure_ascii=False, default=str) + "\n"
        if self._size >= self._limit:
            self._cut()
        self._storage.append(self._path, line)
        self._size += len(line.encode())
        self._seq = content["seq"]
        return content

    def stamped(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """The entry as a line would have it, with the number of the line before; nothing is written."""
        if self._seq is None:
            self._catch_up()
        return stamp(entry, self._run_id, self._seq or 0)

    def entries(self) -> list[dict[str, Any]]:
        """All lines that are kept, in order; one that a crash tore is given as ``{"unreadable": text}``."""
        paths = [join(self._run_id, self._piece(number)) for number in self._pieces()]
        return [_parsed(line) for path in [*paths, self._path] for line in self._text(path).splitlines() if line]

    def _catch_up(self) -> bool:
        """Learns number and size if another process has written; whether the last line is torn."""
        if self._seq is not None and self._size_now() == self._size:
            return False
        data = self._storage.read_bytes(self._path) if self._storage.exists(self._path) else b""
        self._size = len(data)
        self._seq = self._last_seq(data.decode(errors="replace").splitlines())
        return data[-1:] not in (b"", b"\n")

    def _last_seq(self, lines: list[str]) -> int:
        """Number of the newest line; lines that say none (torn, or of earlier versions) are counted."""
        for later, line in enumerate(reversed(lines)):
            if (number := _parsed(line).get("seq")) is not None:
                return int(number) + later
        older = self._pieces()
        before = self._last_seq(self._text(join(self._run_id, self._piece(older[-1]))).splitlines()) if older else 0
        return before + len(lines)

    def _size_now(self) -> int:
        if not self._storage.is_local:
            return self._size
        path = self._storage.local_path(self._path)
        return path.stat().st_size if path.exists() else 0

    def _cut(self) -> None:
        pieces = self._pieces()
        new = (pieces[-1] if pieces else 0) + 1
        self._storage.move(self._path, join(self._run_id, self._piece(new)))
        self._size = 0
        for number in [*pieces, new][: -self._kept]:
            self._storage.delete(join(self._run_id, self._piece(number)))

    def _piece(self, number: int) -> str:
        return f"{self._name}.{number}.jsonl"

    def _pieces(self) -> list[int]:
        pattern = re.compile(rf"{self._name}\.(\d+)\.jsonl")
        return sorted(int(found[1]) for name in self._storage.list(self._run_id) if (found := pattern.fullmatch(name)))

    def _text(self, path: str) -> str:
        return self._storage.read_bytes(path).decode(errors="replace") if self._storage.exists(path) else ""


def stamp(entry: Mapping[str, Any], run_id: str, seq: int) -> dict[str, Any]:
    """The entry after time (UTC), number and run; what it says itself of these is kept."""
    return {"time": utc_now(), "seq": seq, "run": run_id, **entry}


def utc_now() -> str:
    """Time in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _parsed(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {"unreadable": line}
