"""A run's own folder ``STORAGE/<run id>/``: what was asked, on what it ran, how it went, its results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fedtailor.core.errors import StorageError
from fedtailor.core.messages import ClientCost, FloatArray
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage, join
from fedtailor.storage.journal import Journal, utc_now
from fedtailor.storage.payloads import TABLE, canonical_json, encode, read_table, sha256
from fedtailor.storage.provenance import hardware, redact, source, versions
from fedtailor.storage.round_store import METRIC_SCHEMA, METRICS, TIMING_SCHEMA, frame_of, timings_table

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
State = Literal["running", "complete", "failed", "interrupted"]
STATES = get_args(State)
STRATEGIES, LAMBDA = "strategies.safetensors", "lambda/"
DONE = "DONE.json"
"""File in an artifact's folder that says that its stage is finished."""

_RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")


class RunFolder:
    """One run; made with `create` or `open`.

    Args:
        storage: storage of the run.
        run_id: name of the folder.

    Raises:
        StorageError: a bad run id.
    """

    def __init__(self, storage: Storage, run_id: str) -> None:
        if not _RUN_ID.fullmatch(run_id) or run_id == "artifacts":
            rule = "1 to 128 of A-Z a-z 0-9 . _ -, no leading dot, and not 'artifacts'"
            raise StorageError(f"run id '{run_id}': allowed are {rule}")
        self.storage, self.run_id = storage, run_id
        self.events, self.failures = Journal(storage, run_id, "events"), Journal(storage, run_id, "failures")
        """``events.jsonl``, see `tracking.events`, and ``failures.jsonl``."""

    @classmethod
    def create(
        cls,
        storage: Storage,
        run_id: str,
        config: Mapping[str, Any],
        overrides: Sequence[Any] = (),
    ) -> RunFolder:
        """Makes the folder as a whole, or opens it if it is there; whether it has this configuration is not looked at.

        Args:
            storage: storage of the run.
            run_id: letters, digits, ``.``, ``_`` and ``-``, at most 128, no leading dot.
            config: resolved configuration, JSON-like; secrets are hidden before anything is written.
            overrides: choices that depart from the defaults, as `experiment.overrides_of` lists them.

        Raises:
            StorageError: a bad run id, or one of something that is no run or was edited.
        """
        run = cls(storage, run_id)
        tree = json.loads(canonical_json(redact(dict(config))))
        content = {
            "schema": SCHEMA, "run_id": run_id, "created": utc_now(), "config_hash": _hash(tree), "config": tree,
            "overrides": redact(list(overrides)), "stages": [], "data": {},
            "versions": versions(), "git": source(), "hardware": hardware(),
        }  # fmt: skip
        if storage.exists(join(run_id, "run.json")) or not run._publish(content):
            run._refuse_edited()
        return run

    @classmethod
    def open(cls, storage: Storage, run_id: str) -> RunFolder:
        """Opens a run.

        Raises:
            StorageError: there is none of this name (names those that exist), or it is of another schema.
        """
        run = cls(storage, run_id)
        if not storage.exists(join(run_id, "run.json")):
            known = ", ".join(run_ids(storage)) or "none"
            raise StorageError(f"no run '{run_id}' in {storage.url} (runs there: {known})")
        schema = run.info().get("schema")
        if schema != SCHEMA:
            raise StorageError(f"run '{run_id}' has schema {schema}, this version reads {SCHEMA}")
        return run

    def info(self) -> dict[str, Any]:
        """Content of ``run.json``."""
        return dict(self.storage.read_json(join(self.run_id, "run.json")))

    def set_stages(self, stages: Sequence[Mapping[str, Any]], unknown: Mapping[str, Any] | None = None) -> None:
        """Records what is known once the data is prepared.

        Args:
            stages: each with key, kind, method, seed and artifact (folder in ``artifacts/``).
            unknown: artifact of tokens to its `tasks.unknown_tokens`.
        """
        found = {} if unknown is None else {"unknown_tokens": dict(unknown)}
        content = {**self.info(), "stages": [dict(stage) for stage in stages], **found}
        self.storage.write_json(join(self.run_id, "run.json"), content)

    def manifest(self, seed: int) -> dict[str, Any] | None:
        """The manifest of the data that a seed's clients were made of; None while not known or once it is gone."""
        names = [stage.get("data") for stage in self.stages("personalise") if stage["seed"] == seed]
        path = f"artifacts/{names[0]}/manifest.json" if names and names[0] else None
        return self.storage.read_json(path) if path and self.storage.exists(path) else None

    def stages(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Recorded stages, all or of one kind: base, strategy or personalise."""
        return [dict(stage) for stage in self.info()["stages"] if kind in (None, stage["kind"])]

    def log(self, stage: Mapping[str, Any]) -> CommitLog:
        """Commits of a stage."""
        return CommitLog(self.storage, join("artifacts", str(stage["artifact"])))

    def set_status(self, state: State, message: str = "", progress: Mapping[str, Any] | None = None) -> None:
        """Writes ``status.json``.

        Raises:
            StorageError: not one of STATES.
        """
        if state not in STATES:
            raise StorageError(f"status '{state}' is not one of {', '.join(STATES)}")
        content = {"state": state, "message": message, "progress": dict(progress or {}), "updated": utc_now()}
        self.storage.write_json(join(self.run_id, "status.json"), redact(content))

    def status(self) -> dict[str, Any]:
        """Content of ``status.json``: state, message, progress, updated."""
        return dict(self.storage.read_json(join(self.run_id, "status.json")))

    def timing(
        self, stage: str, index: int, seconds: Mapping[str, float], costs: Mapping[str, ClientCost] | None = None
    ) -> None:
        """Keeps what the clients of a round or chunk cost, wall seconds first; outside of commits and digest."""
        if not seconds:
            return
        table = timings_table(stage, index, seconds, costs or {})
        name, data = encode(f"{stage.replace('/', '-')}-{index:06d}", table)
        self.storage.write_bytes(join(self.run_id, "timings", name), data, durable=False)

    def timings(self) -> pd.DataFrame:
        """What every client cost, `round_store.TIMING_COLUMNS`; NaN where an earlier version did not note it."""
        folder = join(self.run_id, "timings")
        names = [name for name in self.storage.list(folder) if name.endswith(TABLE)]
        return frame_of(
            [read_table(name, self.storage.read_bytes(join(folder, name))) for name in names], TIMING_SCHEMA
        )

    def set_progress(self, progress: Mapping[str, Any]) -> None:
        """Replaces ``progress.json``, how fast the running stage goes, see `tracking.progress`; never relied on."""
        data = json.dumps(progress, indent=2, allow_nan=False).encode()
        self.storage.write_bytes(join(self.run_id, "progress.json"), data, durable=False)

    def progress(self) -> dict[str, Any]:
        """Content of ``progress.json``; empty if there is none."""
        path = join(self.run_id, "progress.json")
        return dict(self.storage.read_json(path)) if self.storage.exists(path) else {}

    def metrics(self, kind: str | None = None) -> pd.DataFrame:
        """Rows of METRIC_COLUMNS of every committed round and chunk, stages in recorded order.

        Args:
            kind: base, strategy or personalise; None for all.

        Raises:
            StorageError: a committed file is damaged; names it.
        """
        commits = [commit for stage in self.stages(kind) for commit in self.log(stage).all(objects=False)]
        tables = [commit.table(METRICS) for commit in commits if METRICS in commit.objects]
        return frame_of(tables, METRIC_SCHEMA)

    def strategies(self) -> dict[tuple[str, int], dict[str, FloatArray]]:
        """Personalisation strategies: (method, seed) to client to lambda, (L, r_init) float32.

        Raises:
            StorageError: a committed file is damaged; names it.
        """
        strategies: dict[tuple[str, int], dict[str, FloatArray]] = {}
        for stage in self.stages("personalise"):
            for commit in self.log(stage).all(objects=False):
                if STRATEGIES in commit.objects:
                    clients = strategies.setdefault((str(stage["method"]), int(stage["seed"])), {})
                    tensors = commit.tensors(STRATEGIES)
                    clients |= {name.removeprefix(LAMBDA): np.asarray(array) for name, array in tensors.items()}
        return strategies

    def _publish(self, content: Mapping[str, Any]) -> bool:
        """A run exists with its run.json, which comes last and is written once; False: something else is there."""
        if set(self.storage.list(self.run_id)) - {"status.json"}:
            return False
        try:
            self.set_status("running")
            return self.storage.create(join(self.run_id, "run.json"), json.dumps(content, indent=2).encode())
        except BaseException:
            if not self.storage.exists(join(self.run_id, "run.json")):
                self.storage.delete(self.run_id)
            raise

    def _refuse_edited(self) -> None:
        path = join(self.run_id, "run.json")
        if not self.storage.exists(path):
            raise StorageError(f"{self.storage.full(self.run_id)} exists and is no run; choose another --run-id")
        if self.info().get("config_hash") != _hash(self.info().get("config")):
            raise StorageError(f"{self.storage.full(path)} was edited: its config_hash does not fit its config")


def committed_stages(run: RunFolder) -> list[dict[str, Any]]:
    """The stages of a run with ``committed`` rounds or chunks, ``total`` (0: not known here) and ``done``."""
    stages = []
    for stage in run.stages():
        log = run.log(stage)
        count, done = len(log.all(objects=False)), run.storage.exists(join(log.path, DONE))
        total = stage.get("rounds") or (count if done else 0)
        stages.append({**stage, "committed": count, "total": total, "done": done})
    return stages


def run_ids(storage: Storage) -> list[str]:
    """Names of all runs, sorted."""
    names = (name for name in storage.list() if _RUN_ID.fullmatch(name) and name != "artifacts")
    return [name for name in names if storage.exists(join(name, "run.json"))]


def _hash(tree: Any) -> str:
    return sha256(canonical_json(tree))
