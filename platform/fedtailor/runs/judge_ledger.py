"""The folder of a judge's work: its prompt, every reply as it came, and what is settled already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pyarrow as pa

from fedtailor.core.errors import StorageError
from fedtailor.runs import payloads
from fedtailor.runs.journal import Journal
from fedtailor.runs.storage import Storage, join

SETTING, REPLIES = "judge.json", "replies"
SCHEMA = 1
_FIXED = ("run", "model", "template")


@dataclass(frozen=True)
class Judgement:
    """What is known of one judgement.

    Args:
        score: None while there is none.
        model: as the endpoint called it in the newest reply.
        replies: how many came.
        kind: of the newest line: ``reply`` or ``failure`` (the request failed); empty while nothing was asked.
        problem: why the newest try gave no score.
    """

    score: float | None = None
    model: str = ""
    replies: int = 0
    kind: str = ""
    problem: str = ""

    def after(self, line: Mapping[str, Any]) -> Judgement:
        """With a further line of ``replies.jsonl``."""
        new = replace(self, kind=str(line["kind"]), problem=str(line["problem"]))
        if new.kind == "reply":
            new = replace(new, model=str(line["model"]), replies=self.replies + 1)
        return new if line["score"] is None else replace(new, score=float(line["score"]))


class Ledger:
    """Reads and writes the folder; one process at a time, under its lock.

    Args:
        storage: where.
        path: the folder; empty: the storage's root.
        run_id: whose answers are judged.
    """

    def __init__(self, storage: Storage, path: str, run_id: str) -> None:
        self.storage, self.path, self.run_id = storage, path, run_id
        self._known: dict[str, Judgement] = {}
        # Pieces are cut where a file grows large, and all are kept.
        self._journal = Journal(storage, path, REPLIES, kept=2**31)

    def begin(self, setting: Mapping[str, Any]) -> None:
        """Keeps what the scores mean, and reads what is judged already.

        Args:
            setting: with run, model and template, which stay, and ``endpoint``, which is added to those before.

        Raises:
            StorageError: the folder holds other files, or judgements of another run, model or prompt.
        """
        path, where = join(self.path, SETTING), self.storage.full(self.path)
        before = self.storage.read_json(path) if self.storage.exists(path) else {}
        if not before and any(not name.startswith("LOCK") for name in self.storage.list(self.path)):
            raise StorageError(f"{where} is there already and holds no judgements; choose a new folder")
        if before and any(before[key] != setting[key] for key in _FIXED):
            raise StorageError(f"{where} holds judgements of another run, model or prompt; choose a new folder")
        content = {key: value for key, value in setting.items() if key != "endpoint"}
        places = dict.fromkeys([*before.get("endpoints", []), setting["endpoint"]])
        self.storage.write_json(path, {"schema": SCHEMA, **content, "endpoints": list(places)})
        for line in self._journal.entries():
            if "key" in line:
                self._add(line)

    def of(self, key: str) -> Judgement:
        """What is known of a judgement."""
        return self._known.get(key, Judgement())

    def note(self, line: Mapping[str, Any]) -> None:
        """Keeps one reply, or one request that failed."""
        self._journal.append({**line, "run": self.run_id})
        self._add(line)

    def table(self, name: str, frame: pd.DataFrame) -> None:
        """Writes a table as Parquet."""
        named, data = payloads.encode(name, pa.Table.from_pandas(frame, preserve_index=False))
        self.storage.write_bytes(join(self.path, named), data)

    def text(self, name: str, text: str) -> None:
        """Writes a text."""
        self.storage.write_bytes(join(self.path, name), text.encode())

    def _add(self, line: Mapping[str, Any]) -> None:
        key = str(line["key"])
        self._known[key] = self.of(key).after(line)
