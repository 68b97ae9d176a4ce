"""What a stage has spent of its privacy: a file that only grows, written before any noise is drawn.

A round that is run again (a crash between ledger and commit, a damaged commit) mostly has the same sum; the noise is a
function of coordinates, so the same bytes are released, and nothing more is spent. If the sum differs (another GPU
kernel, another client that failed), the old noise must not be used again: two sums under one noise can be subtracted.
It then counts as one release more, with noise of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from math import inf, isfinite
from typing import Any

from fedtailor.core.errors import StorageError
from fedtailor.federated.release import PrivacySpend
from fedtailor.privacy.accounting import Mechanism, Spent, epsilon
from fedtailor.storage.files import Storage, join

LEDGER = "privacy.jsonl"


class PrivacyLedger:
    """Releases of one stage. Only the holder of the artifact's lock writes.

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

    def spent(self) -> Spent:
        """All releases written down so far."""
        return self._spent(self.entries())

    def entries(self) -> list[dict[str, Any]]:
        """The ledger's lines. A last line without an end was never relied on and does not count.

        Raises:
            StorageError: damaged anywhere else.
        """
        lines = self._text().split("\n")[:-1]
        try:
            return [json.loads(line) for line in lines]
        except ValueError as error:
            raise StorageError(f"{self._storage.full(self._path)} is damaged: {error}") from error

    def record_spend(self, round: int, fingerprint: str) -> PrivacySpend:
        """Writes a release down; durable when it returns.

        Raises:
            StorageError: the ledger lacks a round before this one, or the spend would be less than it was.
        """
        entries = self.entries()
        if missing := set(range(round)) - {int(entry["round"]) for entry in entries}:
            raise StorageError(
                f"{self._storage.full(self._path)} lacks round {min(missing)}, which was released: what was spent is "
                "not known. Restore it, or move the artifact away to compute the stage again"
            )
        same = [entry for entry in entries if entry["round"] == round]
        for entry in same:
            if entry["sum"] == fingerprint:
                return self._spend(int(entry["draw"]), _number(entry["epsilon"]))
        number = len(same)
        total = epsilon(self._mechanism, (*self._before, self._spent([*entries, {"round": round}])))
        highest = max((_number(entry["epsilon"]) for entry in entries), default=0.0)
        if total < highest:
            raise StorageError(f"{self._storage.full(self._path)}: epsilon fell from {highest:g} to {total:g}")
        self._append(round, number, total, fingerprint)
        return self._spend(number, total)

    def _append(self, round: int, draw: int, total: float, fingerprint: str) -> None:
        text = self._text()
        if not text.endswith("\n") and text:
            whole = text[: text.rfind("\n") + 1]
            self._storage.write_bytes(self._path, whole.encode())
        m = self._mechanism
        entry = {
            "round": round, "draw": draw, "epsilon": total if isfinite(total) else None, "delta": m.delta,
            "noise_multiplier": m.noise_multiplier, "clip": m.clip, "sampler": m.sampler, "pool": m.pool,
            "cohort": self._cohort, "sum": fingerprint,
        }  # fmt: skip
        self._storage.append(self._path, json.dumps(entry) + "\n")
        self._storage.flush([self._path])

    def _text(self) -> str:
        return self._storage.read_bytes(self._path).decode() if self._storage.exists(self._path) else ""

    def _spent(self, entries: Sequence[dict[str, Any]]) -> Spent:
        counts = Counter(int(entry["round"]) for entry in entries)
        return Spent(self._cohorts, self._cohort, tuple(counts[r] for r in range(max(counts, default=-1) + 1)))

    def _spend(self, number: int, total: float) -> PrivacySpend:
        return PrivacySpend(number, total, self._mechanism.delta)


def _number(value: float | None) -> float:
    return inf if value is None else float(value)
