"""The table of what each client cost, a row per (stage, round, client); kept outside of commits and digest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

import pandas as pd
import pyarrow as pa

from fedtailor.core.messages import ClientCost

COLUMNS: tuple[str, ...] = ("stage", "round", "client", "seconds", *(field.name for field in fields(ClientCost)))
"""``round``: the round or chunk. ``seconds``: wall time of a worker, a group's time shared equally. Then the fields
of `ClientCost`; unknown in runs that kept seconds only."""

_TEXTS = ("stage", "client", "host")

SCHEMA = pa.schema(
    (name, pa.string() if name in _TEXTS else pa.float64() if name == "seconds" else pa.int64()) for name in COLUMNS
)


def encoded(stage: str, index: int, seconds: Mapping[str, float], costs: Mapping[str, ClientCost]) -> pa.Table:
    """`SCHEMA` with a row per client of ``seconds``; null what ``costs`` does not say."""
    rows = [
        {"stage": stage, "round": index, "client": client, "seconds": float(value)}
        | (asdict(costs[client]) if client in costs else {})
        for client, value in seconds.items()
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """All rows with `COLUMNS`; NaN in columns that a table does not have."""
    if not tables:
        return pd.DataFrame({name: [] for name in COLUMNS})
    found: pd.DataFrame = pa.concat_tables(_completed(table) for table in tables).to_pandas()
    return found


def _completed(table: pa.Table) -> pa.Table:
    columns = [
        table.column(field.name).cast(field.type)
        if field.name in table.column_names
        else pa.nulls(len(table), field.type)
        for field in SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)
