"""Asks an endpoint for many judgements at once, in a given order, and notes every reply as it comes.

The folder of a judge's work: its prompt, every reply as it came, and what is settled already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final, TypeAlias

import pandas as pd
import pyarrow as pa

from fedtailor.core.errors import JudgeError, StorageError
from fedtailor.report.judge_client import AskError, Endpoint
from fedtailor.report.judge_prompt import Messages, NoScoreError, Template
from fedtailor.storage import payloads
from fedtailor.storage.files import Storage, join
from fedtailor.storage.journal import Journal

GIVE_UP: Final = 10
"""Failed requests in a row after which the rest is not asked."""

Line: TypeAlias = dict[str, Any]

Answer: TypeAlias = tuple[list[Line], AskError | None]


@dataclass(frozen=True)
class Task:
    """One judgement to ask for.

    Args:
        key: see `judge_prompt.judgement_key`.
        prompt: hash of the messages.
        repeat: from 0.
        messages: makes the conversation.
    """

    key: str
    prompt: str
    repeat: int
    messages: Callable[[], Messages]


@dataclass(frozen=True)
class Asker:
    """How to ask.

    Args:
        endpoint: whom.
        template: whose replies are read.
        tries: replies to ask for until one holds a score.
        at_once: requests that run at the same time.
        note: called in one thread with every reply and every failed request.
        tell: called with the number of tasks that are through.
    """

    endpoint: Endpoint
    template: Template
    tries: int
    at_once: int
    note: Callable[[Line], None]
    tell: Callable[[int], None]

    def ask(self, tasks: Sequence[Task]) -> set[str]:
        """Asks in order; the first task alone, so that an endpoint that is down is found before work starts.

        Returns:
            Keys of tasks that were not asked, because the endpoint failed `GIVE_UP` times in a row or refuses all.

        Raises:
            JudgeError: the endpoint is down: the first task has no reply.
        """
        if not tasks:
            return set()
        error = self._noted([self._one(tasks[0])])[0]
        if error is not None and error.down:
            raise JudgeError(f"nothing was judged: {error}")
        self.tell(1)
        left = iter(tasks[1:])
        self._together(left, 1, int(error is not None))
        return {task.key for task in left}

    def _together(self, left: Iterator[Task], through: int, in_a_row: int) -> None:
        with ThreadPoolExecutor(self.at_once, thread_name_prefix="judge") as pool:
            running: set[Future[Answer]] = set()
            stopped, free = False, self.at_once
            try:
                while True:
                    if not stopped:
                        running |= {pool.submit(self._one, task) for task in islice(left, free)}
                    if not running:
                        return
                    ended, running = wait(running, return_when=FIRST_COMPLETED)
                    free = len(ended)
                    for error in self._noted(future.result() for future in ended):
                        in_a_row = 0 if error is None else in_a_row + 1
                        stopped = stopped or in_a_row >= GIVE_UP or (error is not None and error.hopeless)
                    self.tell(through := through + free)
            except KeyboardInterrupt:
                # What is asked already may have been paid for.
                self._noted(future.result() for future in wait(running).done)
                raise

    def _noted(self, answers: Iterable[Answer]) -> list[AskError | None]:
        errors = []
        for lines, error in answers:
            for line in lines:
                self.note(line)
            errors.append(error)
        return errors

    def _one(self, task: Task) -> Answer:
        messages, lines = task.messages(), list[Line]()
        for number in range(1, self.tries + 1):
            line: Line = {"key": task.key, "prompt_sha256": task.prompt, "repeat": task.repeat}
            try:
                reply = self.endpoint.ask(messages)
            except AskError as error:
                return [*lines, {**line, "kind": "failure", "score": None, "problem": str(error)}], error
            text = None if reply.text is None else self.endpoint.hide(reply.text)
            line |= {"kind": "reply", "number": number, "model": reply.model, "finish": reply.finish, "reply": text}
            try:
                return [*lines, {**line, "score": self.template.score(reply.text, reply.finish), "problem": ""}], None
            except NoScoreError as error:
                lines.append({**line, "score": None, "problem": self.endpoint.hide(str(error))})
                messages = self.template.again(messages, reply.text or "", str(error))
        return lines, None


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
