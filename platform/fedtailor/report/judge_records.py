"""What a judge reads and keeps: the answers of a finished generation run, and every reply as it came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import pandas as pd
import pyarrow as pa

from fedtailor.core.errors import ConfigError, StorageError, did_you_mean
from fedtailor.core.seeding import numpy_rng
from fedtailor.storage.files import Storage, join
from fedtailor.storage.journal import Journal
from fedtailor.storage.round_store import PREDICTION_SCHEMA, PREDICTIONS
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.task import TASKS

QUESTION = ["seed", "client", "row"]
"""What names a question; every method and budget answers it."""

SETTING, REPLIES = "judge.json", "replies"

SCHEMA: Final = 1

_FIXED = ("run", "model", "template")


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
        f"--method {name}: not in this run{did_you_mean(name, known)} (it has: {', '.join(known)})"
        for name in methods
        if name not in known
    ]
    if problems:
        raise ConfigError(problems)
    task, state = config["task"]["name"], run.status()["state"]
    if TASKS[task].kind != "generation":
        raise StorageError(f"run '{run.run_id}' has no answers to judge: task {task} asks for classes")
    if state != "complete":
        raise StorageError(f"run '{run.run_id}' is {state}, not complete; resume it first")
    if not config["personalise"].get("save_predictions"):
        raise StorageError(
            f"run '{run.run_id}' kept no answers: personalise.save_predictions was off. Run it with "
            "personalise.save_predictions=true; all stages but the personalising ones are reused"
        )


def _read(run: RunFolder, methods: Sequence[str]) -> pd.DataFrame:
    frames = [pd.DataFrame(columns=["seed", *PREDICTION_SCHEMA.names])]
    for stage in run.stages("personalise"):
        if methods and stage["method"] not in methods:
            continue
        commits = run.log(stage).all(objects=False)
        tables = [commit.table(PREDICTIONS) for commit in commits if PREDICTIONS in commit.objects]
        if tables:
            frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
            frames.append(frame.assign(seed=int(stage["seed"])))
    return pd.concat(frames[1:], ignore_index=True) if len(frames) > 1 else frames[0]


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

    def _add(self, line: Mapping[str, Any]) -> None:
        key = str(line["key"])
        self._known[key] = self.of(key).after(line)
