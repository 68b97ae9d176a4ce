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
        labels: classes of the task.
        notes: what preparing the data found or dropped, by name.
        pretrain: content of the model folder's ``pretrain.json``.
        times: stage, round, client, seconds: seconds of a worker per client.
        events: lines of ``events.jsonl``.
    """

    clients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_CLIENT_COLUMNS)))
    class_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    notes: Mapping[str, int | str] = field(default_factory=dict)
    pretrain: Mapping[str, Any] | None = None
    times: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_TIME_COLUMNS)))
    events: Sequence[Mapping[str, Any]] = ()


def gather(run: RunFolder, metrics: pd.DataFrame) -> Evidence:
    """Reads what the folder holds.

    Args:
        run: the run.
        metrics: its metric rows, from which the right data set is told.

    Raises:
        DataError: a pretrain.json that is not a JSON mapping.
    """
    info = run.info()
    manifest = _manifest(run.storage, info, metrics) or {}
    clients = clients_of(manifest) if manifest else ()
    rows = [(c.id, c.pool, c.language, c.n_train, c.n_test) for c in clients]
    return Evidence(
        clients=pd.DataFrame(rows, columns=list(_CLIENT_COLUMNS)),
        class_counts={str(c["id"]): tuple(c["train_classes"]) for c in manifest.get("clients", ())},
        labels=tuple(str(label) for label in manifest.get("labels", ())),
        notes=dict(manifest.get("notes", {})),
        pretrain=_pretrain(run.storage, info),
        times=run.timings(),
        events=run.events(),
    )


def _manifest(storage: Storage, info: Mapping[str, Any], metrics: pd.DataFrame) -> dict[str, Any] | None:
    """The manifest of the run's first seed; None where none fits, or several that differ do."""
    config = info.get("config") or {}
    paths = [f"artifacts/{name}/manifest.json" for name in storage.list("artifacts") if name.startswith("data-")]
    found = [storage.read_json(path) for path in paths if storage.exists(path)]
    shared = (config.get("base") or {}).get("seed")
    first = next(iter(config.get("seeds") or ()), None)
    seed, tested = first if shared is None else shared, _test_texts(metrics[metrics["seed"] == first])
    fitting = {
        str(m["hash"]): m
        for m in found
        if m.get("seed") == seed and m.get("task") == config["task"]["name"] and _fits(m, config, tested)
    }
    return dict(next(iter(fitting.values()))) if len(fitting) == 1 else None


def _fits(manifest: Mapping[str, Any], config: Mapping[str, Any], tested: Mapping[str, float]) -> bool:
    """Same task settings, and every tested client has as many test texts as its results say."""
    own, sizes = manifest.get("config") or {}, {c["id"]: c["n_test"] for c in manifest["clients"]}
    # A scaled run keeps fewer clients than its configuration says.
    same = all(config["task"].get(key) == value for key, value in own.items() if key != "clients_kept")
    return same and all(sizes.get(client) == n for client, n in tested.items())


def _test_texts(metrics: pd.DataFrame) -> dict[str, float]:
    rows = metrics[(metrics["stage"] == "personalise") & (metrics["metric"] == "accuracy")]
    sizes = rows.groupby(["client", "method", "budget", "seed"])["weight"].sum().groupby("client").max()
    return {str(client): float(n) for client, n in sizes.items()}


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
