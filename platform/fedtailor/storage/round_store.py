"""The rounds of a stage in its commit log, and the tables of a run: metrics, answers, costs of clients.

`CommittedRounds` is `federated.rounds.RoundLog` on top of `CommitLog`. Answers (`personalise.save_predictions`) are
kept to be read and judged, costs to be counted; both stand outside of the digest, so a run is the same without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fedtailor.core.errors import StorageError
from fedtailor.core.files import file_name
from fedtailor.core.messages import METRIC_COLUMNS, ClientCost, FloatArray, Row
from fedtailor.core.scope import ParamSpec
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.payloads import Payload

if TYPE_CHECKING:  # reading a run's folder needs no torch
    import pandas as pd

    from fedtailor.federated.rounds import RoundOutcome, RoundState

SHARED, SERVER, PRIVATE = "global/shared.safetensors", "server/state.safetensors", "clients/private.safetensors"
METRICS, PREDICTIONS = "metrics.parquet", "predictions.parquet"
HEAVY = ("global/", "server/")
"""Beginnings of the objects that old rounds lose."""

ADAPTERS = "adapters/"
"""Beginning of the names of exported adapters' files."""

TIMING_COLUMNS: tuple[str, ...] = ("stage", "round", "client", "seconds", *(field.name for field in fields(ClientCost)))
"""``round``: the round or chunk. ``seconds``: wall time of a worker, a group's time shared equally. Then the fields
of `ClientCost`; unknown in runs that kept seconds only."""

_FLOATS = {"value", "weight", "seconds", "search_seconds"}
_INTEGERS = {"seed", "round", "budget", "row", *TIMING_COLUMNS} - {"stage", "client", "host"}


def _schema(*columns: str) -> pa.Schema:
    kinds = {**dict.fromkeys(_INTEGERS, pa.int64()), **dict.fromkeys(_FLOATS, pa.float64())}
    return pa.schema([(name, kinds.get(name, pa.string())) for name in columns])


METRIC_SCHEMA, TIMING_SCHEMA = _schema(*METRIC_COLUMNS), _schema(*TIMING_COLUMNS)
PREDICTION_SCHEMA = _schema("client", "language", "budget", "method", "row", "prompt", "reference", "prediction")
"""``language`` is the example's group; ``budget`` -1 where it does not apply; ``row`` the example's number among the
client's test examples; ``prompt`` the instruction without its template. Where inputs have several references, a column
``others`` has those beside the first."""


def adapter_files(lane: str) -> str:
    """Beginning of the names of the files of a client's adapter.

    >>> adapter_files("r8/seen/amh/00"), adapter_files("r8/seen/all/Ana")
    ('adapters/r8/seen/amh/00/', 'adapters/r8/seen/all/%41na/')

    Args:
        lane: ``r<budget>/<client>``, or ``all/<client>``.
    """
    return f"{ADAPTERS}{'/'.join(map(file_name, lane.split('/')))}/"


def table_of(rows: Iterable[Mapping[str, Any]], schema: pa.Schema) -> pa.Table:
    """Rows as an Arrow table, in the order given; null where a row does not say."""
    return pa.Table.from_pylist(list(rows), schema)


def predictions_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """`PREDICTION_SCHEMA` with a row per answer."""
    others = pa.field("others", pa.list_(pa.string()))
    return table_of(rows, PREDICTION_SCHEMA.append(others) if "others" in rows[0] else PREDICTION_SCHEMA)


def timings_table(stage: str, index: int, seconds: Mapping[str, float], costs: Mapping[str, ClientCost]) -> pa.Table:
    """`TIMING_SCHEMA` with a row per client of ``seconds``; null what ``costs`` does not say."""
    rows = [
        {"stage": stage, "round": index, "client": client, "seconds": float(value)}
        | (asdict(costs[client]) if client in costs else {})
        for client, value in seconds.items()
    ]
    return table_of(rows, TIMING_SCHEMA)


def frame_of(tables: Sequence[pa.Table], schema: pa.Schema) -> pd.DataFrame:
    """All rows with the schema's columns; NaN in columns that a table of an earlier version does not have."""
    whole = pa.concat_tables([schema.empty_table(), *tables], promote_options="permissive")
    frame: pd.DataFrame = whole.select(schema.names).to_pandas()
    return frame


def named(specs: Sequence[ParamSpec], flat: Row) -> dict[str, Row]:
    """A flat row as named tensors, copies."""
    tensors, start = {}, 0
    for spec in specs:
        tensors[spec.name] = flat[start : start + spec.size].reshape(spec.shape).copy()
        start += spec.size
    return tensors


def flatten(specs: Sequence[ParamSpec], tensors: Mapping[str, FloatArray]) -> Row:
    """Named tensors as a flat float32 row.

    Raises:
        StorageError: names or shapes differ from the specs.
    """
    if set(tensors) != {spec.name for spec in specs}:
        raise StorageError(f"saved parameters {sorted(tensors)} are not those declared {[s.name for s in specs]}")
    for spec in specs:
        if tensors[spec.name].shape != spec.shape:
            raise StorageError(f"{spec.name}: saved shape {tensors[spec.name].shape}, declared {spec.shape}")
    parts = [tensors[spec.name].ravel() for spec in specs]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


class CommittedRounds:
    """Rounds of one stage.

    Args:
        log: the stage's commits.
        shared: SHARED parameters in flat order.
        keep: newest round states to keep; older ones lose their weights, not their metrics.
    """

    def __init__(self, log: CommitLog, shared: Sequence[ParamSpec], keep: int) -> None:
        self._log, self._specs, self._keep = log, tuple(shared), keep
        self._cache: dict[int, Mapping[str, FloatArray]] = {}

    def newest(self) -> RoundState | None:
        """The newest verified round; what does not verify goes to quarantine."""
        from fedtailor.federated.rounds import RoundState

        commit = self._log.newest()
        if commit is None:
            return None
        server = commit.tensors(SERVER) if SERVER in commit.objects else {}
        shared = flatten(self._specs, commit.tensors(SHARED))
        return RoundState(commit.index + 1, shared, server, dict(commit.record["private_at"]))

    def private_at(self) -> dict[str, int]:
        """Client to the round whose commit holds its newest PRIVATE row."""
        commit = self._log.newest()
        return {} if commit is None else dict(commit.record["private_at"])

    def private(self, client: str, round: int) -> FloatArray:
        """A client's PRIVATE row as committed in ``round``."""
        if round not in self._cache:
            # Rows can be as large as a model's embeddings, so only a few rounds stay in memory.
            kept = dict(list(self._cache.items())[:3])
            self._cache = {round: self._log.read(round).tensors(PRIVATE), **kept}
        return self._cache[round][client]

    def commit(self, outcome: RoundOutcome) -> None:
        """Keeps a round, then drops the weights of old ones."""
        state = outcome.state
        objects: dict[str, Payload] = {
            SHARED: named(self._specs, state.shared),
            METRICS: table_of(outcome.metrics, METRIC_SCHEMA),
        }
        if state.server:
            objects[SERVER] = dict(state.server)
        if outcome.private:
            objects[PRIVATE] = dict(outcome.private)
        record: dict[str, Any] = {
            "kind": "round",
            "cohort": list(outcome.cohort),
            "weights": dict(outcome.weights),
            "rejected": [asdict(failure) for failure in outcome.failures],
            "private_at": dict(state.private_at),
        }
        if (spent := outcome.spent) is not None:
            epsilon = spent.epsilon if isfinite(spent.epsilon) else None
            record["privacy"] = {"epsilon": epsilon, "delta": spent.delta, "draw": spent.number}
        self._log.commit(state.round - 1, objects, record)
        self._log.prune(self._keep, HEAVY)
