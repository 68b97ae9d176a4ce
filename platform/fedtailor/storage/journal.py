"""Files of lines that only grow: a run's events and failures (`Journal`), what a stage spent of its privacy."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from math import inf, isfinite
from typing import Any

from fedtailor.core.errors import StorageError, reported_as
from fedtailor.federated.release import PrivacySpend
from fedtailor.privacy.accounting import Mechanism, Spent, epsilon
from fedtailor.storage.files import Storage, join
from fedtailor.storage.provenance import redact

LEDGER = "privacy.jsonl"
LIMIT = 10 * 2**20
"""Bytes of a piece. A store that cannot append rewrites the piece for every line, so there it is `REMOTE_LIMIT`."""

REMOTE_LIMIT = 2**18
KEPT = 5
"""Full pieces that are kept beside the one that is written."""


class Journal:
    """Numbered lines of one kind, cut into pieces of bounded size; one process writes at a time.

    ``events.jsonl`` is written; when it is full it becomes ``events.1.jsonl``, the next time ``events.2.jsonl`` and so
    on, and only the newest pieces are kept. ``seq`` counts entries without a gap, over all pieces and over restarts: a
    hole is a lost line, and the first number tells how many were given up. Order is by ``seq``; clocks may jump.

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
            pieces = self._pieces()
            number = (max(pieces) if pieces else 0) + 1
            self._storage.move(self._path, join(self._run_id, f"{self._name}.{number}.jsonl"))
            for path in list(pieces.values())[: max(0, len(pieces) + 1 - self._kept)]:
                self._storage.delete(path)
            self._size = 0
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
        paths = [*self._pieces().values(), self._path]
        return [_parsed(line) for path in paths for line in _text(self._storage, path).splitlines() if line]

    def _catch_up(self) -> bool:
        """Learns number and size if another process has written; whether the last line is torn."""
        known = self._seq is not None
        if known and (not self._storage.is_local or self._storage.size(self._path) == self._size):
            return False
        text = _text(self._storage, self._path)
        self._size, self._seq = self._storage.size(self._path), self._last_seq(text.splitlines())
        return not text.endswith("\n") and text != ""

    def _last_seq(self, lines: list[str]) -> int:
        """Number of the newest line; lines that say none (torn, or of earlier versions) are counted."""
        for later, line in enumerate(reversed(lines)):
            if (number := _parsed(line).get("seq")) is not None:
                return int(number) + later
        older = list(self._pieces().values())
        return len(lines) + (self._last_seq(_text(self._storage, older[-1]).splitlines()) if older else 0)

    def _pieces(self) -> dict[int, str]:
        """Paths of the full pieces by number, oldest first."""
        pattern = re.compile(rf"{self._name}\.(\d+)\.jsonl")
        found = {int(m[1]): m[0] for name in self._storage.list(self._run_id) if (m := pattern.fullmatch(name))}
        return {number: join(self._run_id, found[number]) for number in sorted(found)}


def stamp(entry: Mapping[str, Any], run_id: str, seq: int) -> dict[str, Any]:
    """The entry after time (UTC), number and run; what it says itself of these is kept."""
    return {"time": utc_now(), "seq": seq, "run": run_id, **entry}


def utc_now() -> str:
    """Time in UTC, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class PrivacyLedger:
    """Releases of one stage, each durable before any noise is drawn. Only the holder of the artifact's lock writes.

    A round that is run again (a crash between ledger and commit, a damaged commit) mostly has the same sum; the noise
    is a function of coordinates, so the same bytes are released, and nothing more is spent. If the sum differs (another
    GPU kernel, another client that failed), the old noise must not be used again: two sums under one noise can be
    subtracted. It then counts as one release more, with noise of its own.

    Args:
        storage: storage of the ledger.
        folder: the artifact's folder.
        mechanism: noise, clip, delta and sampling.
        cohorts: see `Spent.cohorts`.
        cohort: clients per round.
        before: what the stages that this one builds on have spent.
    """

    def __init__(
        self,
        storage: Storage,
        folder: str,
        mechanism: Mechanism,
        cohorts: str,
        cohort: int,
        before: Sequence[Spent] = (),
    ) -> None:
        self._storage, self._path, self._mechanism = storage, join(folder, LEDGER), mechanism
        self._cohorts, self._cohort, self._before = cohorts, cohort, tuple(before)

    def spent(self, *more: Mapping[str, Any]) -> Spent:
        """All releases written down so far, and ``more``."""
        counts = Counter(int(entry["round"]) for entry in [*self.entries(), *more])
        return Spent(self._cohorts, self._cohort, tuple(counts[r] for r in range(max(counts, default=-1) + 1)))

    def entries(self) -> list[dict[str, Any]]:
        """The ledger's lines. A last line without an end was never relied on and does not count.

        Raises:
            StorageError: damaged anywhere else.
        """
        with reported_as(StorageError, f"{self._storage.full(self._path)} is damaged", ValueError):
            return [json.loads(line) for line in _text(self._storage, self._path, "strict").split("\n")[:-1]]

    def record_spend(self, round: int, fingerprint: str) -> PrivacySpend:
        """Writes a release down; durable when it returns.

        Raises:
            StorageError: the ledger lacks a round before this one, or the spend would be less than it was.
        """
        entries, m = self.entries(), self._mechanism
        if missing := set(range(round)) - {int(entry["round"]) for entry in entries}:
            raise StorageError(
                f"{self._storage.full(self._path)} lacks round {min(missing)}, which was released: what was spent is "
                "not known. Restore it, or move the artifact away to compute the stage again"
            )
        same = [entry for entry in entries if entry["round"] == round]
        for entry in same:
            if entry["sum"] == fingerprint:
                return PrivacySpend(int(entry["draw"]), _number(entry["epsilon"]), m.delta)
        total = epsilon(m, (*self._before, self.spent({"round": round})))
        highest = max((_number(entry["epsilon"]) for entry in entries), default=0.0)
        if total < highest:
            raise StorageError(f"{self._storage.full(self._path)}: epsilon fell from {highest:g} to {total:g}")
        entry = {
            "round": round, "draw": len(same), "epsilon": total if isfinite(total) else None, "delta": m.delta,
            "noise_multiplier": m.noise_multiplier, "clip": m.clip, "sampler": m.sampler, "pool": m.pool,
            "cohort": self._cohort, "sum": fingerprint,
        }  # fmt: skip
        text = _text(self._storage, self._path)
        if not text.endswith("\n") and text:
            self._storage.write_bytes(self._path, text[: text.rfind("\n") + 1].encode())
        self._storage.append(self._path, json.dumps(entry) + "\n")
        self._storage.flush([self._path])
        return PrivacySpend(len(same), total, m.delta)


def _number(value: float | None) -> float:
    return inf if value is None else float(value)


def _text(storage: Storage, path: str, errors: str = "replace") -> str:
    return storage.read_bytes(path).decode(errors=errors) if storage.exists(path) else ""


def _parsed(line: str) -> dict[str, Any]:
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {"unreadable": line}
