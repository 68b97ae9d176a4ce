"""Answers of a generation run beside their questions and references, as a table of each chunk's commit.

They are kept to be read and judged (`personalise.save_predictions`) and stand outside of the digest, which the metrics
made of them enter: a run is the same run whether or not its answers are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

PREDICTIONS = "predictions.parquet"
SCHEMA = pa.schema(
    [
        ("client", pa.string()),
        ("language", pa.string()),
        ("budget", pa.int64()),
        ("method", pa.string()),
        ("row", pa.int64()),
        ("prompt", pa.string()),
        ("reference", pa.string()),
        ("prediction", pa.string()),
    ]
)
"""``language`` is the example's group; ``budget`` -1 where it does not apply; ``row`` the example's number among the
client's test examples; ``prompt`` the instruction without its template."""


def predictions_table(rows: Iterable[Mapping[str, Any]]) -> pa.Table:
    """Rows of SCHEMA as an Arrow table, in the order given: clients, budgets, examples."""
    return pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
