"""The answers of a finished generation run that a judge is to score."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import pyarrow as pa

from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.task_settings import GENERATION_TASKS
from fedtailor.runs.experiment import nearest
from fedtailor.runs.predictions import PREDICTIONS, SCHEMA
from fedtailor.runs.run_folder import RunFolder

QUESTION = ["seed", "client", "row"]
"""What names a question; every method and budget answers it."""


def kept_answers(run: RunFolder, methods: Sequence[str], limit: int | None, order: int) -> pd.DataFrame:
    """Rows of `predictions.SCHEMA` and ``seed``, questions in an order drawn from ``order``.

    Args:
        run: complete, of a generation task, with ``personalise.save_predictions=true``.
        methods: whose answers; empty: of all.
        limit: take so many questions at most, the first of that order, with the answers of all methods to them.
        order: seed of the order.

    Raises:
        ConfigError: a method that the run has not.
        StorageError: not complete, no generation task, answers were not kept, or a committed file is damaged.
    """
    _refuse(run, methods)
    frame = _read(run, methods)
    if frame.empty:
        raise StorageError(f"run '{run.run_id}' has no answers of {', '.join(methods) or 'any method'}")
    questions = frame[QUESTION].drop_duplicates().sort_values(QUESTION, ignore_index=True)
    drawn = questions.iloc[numpy_rng(order, "judge", "order").permutation(len(questions))[:limit]]
    place = {tuple(row): number for number, row in enumerate(drawn.itertuples(index=False, name=None))}
    keys = pd.Series(list(frame[QUESTION].itertuples(index=False, name=None)), index=frame.index)
    frame = frame.assign(place=keys.map(place)).dropna(subset=["place"])
    return frame.sort_values(["place", "method", "budget"], ignore_index=True).drop(columns="place")


def _refuse(run: RunFolder, methods: Sequence[str]) -> None:
    config = run.info()["config"]
    known = list(config["methods"])
    problems = [
        f"--method {name}: not in this run{nearest(name, known)} (it has: {', '.join(known)})"
        for name in methods
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    task, state = config["task"]["name"], run.status()["state"]
    if task not in GENERATION_TASKS:
        raise StorageError(f"run '{run.run_id}' has no answers to judge: task {task} asks for classes")
    if state != "complete":
        raise StorageError(f"run '{run.run_id}' is {state}, not complete; resume it first")
    if not config["personalise"].get("save_predictions"):
        raise StorageError(
            f"run '{run.run_id}' kept no answers: personalise.save_predictions was off. Run it with "
            "personalise.save_predictions=true; all stages but the personalising ones are reused"
        )


def _read(run: RunFolder, methods: Sequence[str]) -> pd.DataFrame:
    frames = [pd.DataFrame(columns=["seed", *SCHEMA.names])]
    for stage in run.stages("personalise"):
        if methods and stage["method"] not in methods:
            continue
        commits = run.log(stage).all(objects=False)
        tables = [commit.table(PREDICTIONS) for commit in commits if PREDICTIONS in commit.objects]
        if tables:
            frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
            frames.append(frame.assign(seed=int(stage["seed"])))
    return pd.concat(frames[1:], ignore_index=True) if len(frames) > 1 else frames[0]
