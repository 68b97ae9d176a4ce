"""Asks an endpoint for many judgements at once, in a given order, and notes every reply as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeAlias

from fedtailor.core.errors import JudgeError
from fedtailor.runs.judge_client import AskError, Endpoint
from fedtailor.runs.judge_prompt import Messages, NoScoreError, Template

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
