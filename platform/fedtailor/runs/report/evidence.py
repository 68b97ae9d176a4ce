"""What a run folder holds besides metrics: who has how many texts, what the model was pretrained on, times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedtailor.core.errors import DataError
from fedtailor.runs.run_folder import RunFolder
from fedtailor.runs.storage import Storage
from fedtailor.tasks.store import clients_of

PRETRAIN = "pretrain.json"
_CLIENT_COLUMNS = ("client", "pool", "language", "n_train", "n_test")
_TIME_COLUMNS = ("stage", "round", "client", "seconds")


@dataclass(frozen=True)
class Evidence:
    """Everything is empty or None where the run folder does not say.

    Args:
        clients: client, pool, language, n_train, n_test: one row per client of the data.
        class_counts: client to number of train texts per class, in the order of ``labels``.
        labels: classes of the task, or the groups of a generation task's examples.
        kind: ``classification`` or ``generation``.
        notes: what preparing the data found or dropped, by name.
        pretrain: content of the model folder's ``pretrain.json``.
        times: stage, round, client, seconds: seconds of a worker per client.
        events: lines of ``events.jsonl``.
    """

    clients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_CLIENT_COLUMNS)))
    class_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    notes: Mapping[str, int | str] = field(default_factory=dict)
    pretrain: Mapping[str, Any] | None = None
    times: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_TIME_COLUMNS)))
    events: Sequence[Mapping[str, Any]] = ()


def gather(run: RunFolder) -> Evidence:
    """Reads what the folder holds; the data set is that of the run's first seed.

    Args:
        run: the run.

    Raises:
        DataError: a pretrain.json that is not a JSON mapping.
    """
    info = run.info()
    seeds = (info.get("config") or {}).get("seeds") or ()
    manifest = (run.manifest(seeds[0]) if seeds else None) or {}
    clients = clients_of(manifest) if manifest else ()
    rows = [(c.id, c.pool, c.language, c.n_train, c.n_test) for c in clients]
    return Evidence(
        clients=pd.DataFrame(rows, columns=list(_CLIENT_COLUMNS)),
        class_counts={str(c["id"]): tuple(c["train_classes"]) for c in manifest.get("clients", ())},
        labels=tuple(str(label) for label in manifest.get("labels", ())),
        kind=str(manifest.get("kind", "classification")),
        notes=dict(manifest.get("notes", {})),
        pretrain=_pretrain(run.storage, info),
        times=run.timings(),
        events=run.events(),
    )


def _pretrain(storage: Storage, info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    parents = dict.fromkeys(str(stage.get("parent")) for stage in info.get("stages") or ())
    for artifact in (name for name in parents if name.startswith("model-")):
        path = f"artifacts/{artifact}/{PRETRAIN}"
        if storage.exists(path):
            return _mapping(path, storage.read_json(path))
    folder = ((info.get("config") or {}).get("model") or {}).get("path")
    file = Path(folder) / PRETRAIN if folder else None
    if file is None or not file.is_file():
        return None
    try:
        return _mapping(str(file), json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error


def _mapping(path: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: a mapping of keys was expected, found {type(content).__name__}")
    return content
