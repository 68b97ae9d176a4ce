"""Judgements to a table: methods, budgets and languages, with mean and spread over clients."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import pandas as pd

from fedtailor.runs.report.names import in_method_order, in_pool_order, method_name

AVERAGE = "average"
RESULT_COLUMNS = ("pool", "method", "budget", "language", "mean", "sd", "clients", "answers", "failures")
_CELL = ["pool", "method", "budget", "language"]


def results(judgements: pd.DataFrame) -> pd.DataFrame:
    """Rows of RESULT_COLUMNS, scores in units of the scale.

    An answer's score is the mean of its judgements that hold one, a client's the mean of its answers (once per seed).
    ``mean`` and ``sd`` (sample SD, NaN for one client) are over clients; ``answers`` counts those with a score,
    ``failures`` judgements without one. Language `AVERAGE` weighs languages equally and has no SD.

    Args:
        judgements: rows of `judge.JUDGEMENT_COLUMNS`.
    """
    frame = judgements.assign(pool=judgements["client"].str.partition("/")[0])
    unit = [*_CELL, "seed", "client"]
    answers = frame.groupby([*unit, "row"], as_index=False).agg(score=("score", "mean"), seen=("score", "count"))
    clients = answers.groupby(unit, as_index=False).agg(score=("score", "mean"), answers=("score", "count"))
    table = clients.groupby(_CELL, as_index=False).agg(
        mean=("score", "mean"), sd=("score", "std"), clients=("score", "count"), answers=("answers", "sum")
    )
    lost = frame.assign(failures=frame["score"].isna()).groupby(_CELL, as_index=False)["failures"].sum()
    table = table.merge(lost, on=_CELL)
    return _ordered(pd.concat([table, _averages(table, clients)], ignore_index=True))


def table_text(table: pd.DataFrame, model: str, scale: int, repeats: int) -> str:
    """The table as Markdown, with what its numbers mean."""
    lines = [
        f"# Scores of {model}", "",
        f"0 to {scale}; mean of {repeats} judgement(s) per answer; mean and sample SD over clients.", "",
        "| " + " | ".join(RESULT_COLUMNS) + " |", "|" + " --- |" * len(RESULT_COLUMNS),
        *("| " + " | ".join(shown(row)) + " |" for row in table.to_dict("records")),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def shown(row: Mapping[Hashable, object]) -> list[str]:
    """A row as texts, in the order of RESULT_COLUMNS."""
    told = []
    for name in RESULT_COLUMNS:
        value = row[name]
        if name == "method":
            told.append(method_name(str(value)))
        elif name == "budget":
            told.append("" if value == -1 else str(value))
        elif isinstance(value, float):
            told.append("" if pd.isna(value) else f"{value:.2f}")
        else:
            told.append(str(value).replace("|", "\\|"))
    return told


def _averages(table: pd.DataFrame, clients: pd.DataFrame) -> pd.DataFrame:
    keys = _CELL[:-1]
    scored = clients[clients["answers"] > 0].assign(unit=clients["seed"].astype(str) + "/" + clients["client"])
    people = scored.groupby(keys)["unit"].nunique().rename("clients").reset_index()
    sums = table.groupby(keys, as_index=False).agg(
        mean=("mean", "mean"), answers=("answers", "sum"), failures=("failures", "sum")
    )
    joined = sums.merge(people, on=keys, how="left").assign(language=AVERAGE, sd=float("nan"))
    return joined.assign(clients=joined["clients"].fillna(0).astype(int))


def _ordered(table: pd.DataFrame) -> pd.DataFrame:
    pools, methods = in_pool_order(table["pool"]), in_method_order(table["method"])
    places = table.assign(
        at_pool=table["pool"].map(pools.index),
        at_method=table["method"].map(methods.index),
        at_end=table["language"] == AVERAGE,
    )
    order = ["at_pool", "at_method", "budget", "at_end", "language"]
    return places.sort_values(order, ignore_index=True)[list(RESULT_COLUMNS)]
