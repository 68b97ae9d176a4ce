"""Asks an endpoint that speaks OpenAI's chat completions for many judgements at once, in a given order.

The client of the ``openai`` package tries again and keeps to the time limit; the key gets into no message and no file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event, Lock
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

from fedtailor.core.errors import ConfigError, JudgeError
from fedtailor.report.judge_prompt import Messages, NoScoreError, Template
from fedtailor.storage.provenance import HIDDEN, scrub

if TYPE_CHECKING:
    import openai

Line: TypeAlias = dict[str, Any]
"""Of ``replies.jsonl``."""

KEY: Final = "OPENAI_API_KEY"

GIVE_UP: Final = 10
"""Failed requests in a row after which the rest is not asked."""

_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")

_HOPELESS = (401, 403, 404, 405, 410)
"""HTTP states that every further request would meet too."""

_NO_COMPLETION = "answers, but not with one chat completion; is it the right address?"

_SHOWN = 300


class AskError(JudgeError):
    """A request that failed after all retries.

    Args:
        hopeless: every other request would fail alike.
        down: about the endpoint rather than about this one question.
    """

    def __init__(self, message: str, hopeless: bool = False, down: bool = False) -> None:
        super().__init__(message)
        self.hopeless, self.down = hopeless, down


@dataclass(frozen=True)
class Reply:
    """A whole reply: its text (None: there is none), the model that the endpoint says it used, why it ended."""

    text: str | None
    model: str
    finish: str


class Endpoint:
    """Where judgements come from.

    Args:
        url: base address, e.g. ``http://localhost:8000/v1``.
        model: name that the endpoint knows.
        key_env: environment variable that holds the key; KEY may be unset for endpoints without keys.
        timeout_s: seconds that the endpoint may be silent.
        retries: further tries after 408, 409, 429, 5xx and lost connections, each later than the one before.

    Raises:
        ConfigError: an address or a variable that cannot be used; never tells the key.
    """

    def __init__(self, url: str, model: str, key_env: str = KEY, timeout_s: float = 60.0, retries: int = 5) -> None:
        from openai import OpenAI

        _check_address(url)
        self.url, self.model, self.key_env, self.timeout_s, self.retries = url, model, key_env, timeout_s, retries
        self._key = _key(key_env)
        self._client = OpenAI(api_key=self._key or "none", base_url=url, timeout=timeout_s, max_retries=retries)

    def ask(self, messages: Messages) -> Reply:
        """Asks once, at temperature 0, for the reply in one piece; may be called from several threads.

        Raises:
            AskError: no reply after all retries, or not one of chat completions.
        """
        import openai

        try:
            answer = self._client.chat.completions.create(
                model=self.model,
                messages=messages,  # type: ignore[arg-type]  # the library's own types are dicts like these
                temperature=0,
                stream=False,
                extra_headers={} if self._key else {"Authorization": openai.Omit()},
            )
        except openai.APITimeoutError:
            problem = f"did not answer within {self.timeout_s:g} s, {self.retries + 1} times"
        except openai.APIConnectionError as error:
            problem = f"cannot be reached: {error.__cause__ or error}"
        except openai.APIStatusError as error:
            raise self._refused(error) from None
        except ValueError:
            problem = _NO_COMPLETION
        else:
            return self._reply(answer)
        # No cause is kept anywhere here: it holds the request, and with it the key.
        raise AskError(self.hide(f"{self.url} {problem}"), down=True) from None

    def hide(self, text: str) -> str:
        """A text without the key."""
        return text.replace(self._key, HIDDEN) if self._key else text

    def _reply(self, answer: Any) -> Reply:
        """Reads what the library did not check: it takes any JSON, and texts too, for a completion."""
        try:
            [choice] = answer.choices
            text, finish, model = choice.message.content, choice.finish_reason, answer.model
        except (ValueError, TypeError, AttributeError):
            text = model = 0
        if not isinstance(model, str) or not isinstance(text, str | None):
            raise AskError(f"{self.url} {_NO_COMPLETION}", down=True)
        return Reply(text, self.hide(model), str(finish))

    def _refused(self, error: openai.APIStatusError) -> AskError:
        state = error.status_code
        said = scrub(self.hide(" ".join(str(error).split())))
        hint = f" (no key was sent: {self.key_env} is not set)" if state in (401, 403) and not self._key else ""
        message = f"{self.url} refuses model {self.model}{hint}: {said[:_SHOWN]}"
        return AskError(message, state in _HOPELESS, state in _HOPELESS or state == 429 or state >= 500)


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


def ask_all(
    tasks: Sequence[Task], endpoint: Endpoint, template: Template, tries: int, at_once: int,
    note: Callable[[Line], None], tell: Callable[[int], None],
) -> set[str]:  # fmt: skip
    """Asks in order; the first task alone, so that an endpoint that is down is found before work starts.

    Args:
        tasks: what to ask for.
        endpoint: where.
        template: reads the replies.
        tries: replies to ask for until one holds a score.
        at_once: requests that run at the same time.
        note: called with every reply and every failed request, one at a time.
        tell: called with the number of tasks that are through, one at a time.

    Returns:
        Keys of tasks that were not asked, because the endpoint failed `GIVE_UP` times in a row or refuses all.

    Raises:
        JudgeError: the endpoint is down: the first task has no reply.
    """
    guard, stopped, asked, failures = Lock(), Event(), set[str](), 0

    def ask(task: Task) -> AskError | None:
        nonlocal failures
        if stopped.is_set():
            return None
        lines, error = _ask(task, endpoint, template, tries)
        with guard:
            try:
                # Noted here, not where results are collected: after Ctrl-C too, what is asked may have been paid for.
                for line in lines:
                    note(line)
                asked.add(task.key)
                failures = 0 if error is None else failures + 1
                if failures >= GIVE_UP or (error is not None and error.hopeless):
                    stopped.set()
                tell(len(asked))
            except BaseException:
                stopped.set()
                raise
        return error

    if tasks and (first := ask(tasks[0])) is not None and first.down:
        raise JudgeError(f"nothing was judged: {first}")
    with ThreadPoolExecutor(at_once, thread_name_prefix="judge") as pool:
        try:
            for _ in pool.map(ask, tasks[1:]):
                pass
        finally:
            stopped.set()
    return {task.key for task in tasks} - asked


def _ask(task: Task, endpoint: Endpoint, template: Template, tries: int) -> tuple[list[Line], AskError | None]:
    """Lines on every reply until one holds a score, and the error that ended it."""
    messages, lines = task.messages(), list[Line]()
    for number in range(1, tries + 1):
        line: Line = {"key": task.key, "prompt_sha256": task.prompt, "repeat": task.repeat}
        try:
            reply = endpoint.ask(messages)
        except AskError as error:
            return [*lines, {**line, "kind": "failure", "score": None, "problem": str(error)}], error
        text = None if reply.text is None else endpoint.hide(reply.text)
        line |= {"kind": "reply", "number": number, "model": reply.model, "finish": reply.finish, "reply": text}
        try:
            return [*lines, {**line, "score": template.score(reply.text, reply.finish), "problem": ""}], None
        except NoScoreError as error:
            lines.append({**line, "score": None, "problem": endpoint.hide(str(error))})
            messages = template.again(messages, reply.text or "", str(error))
    return lines, None


def _check_address(url: str) -> None:
    example = "give its base, e.g. http://localhost:8000/v1"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        raise ConfigError(f"--endpoint is no address; {example}") from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"--endpoint: no user, password or query belongs in it, as it is kept; {example}")
    if not usable:
        raise ConfigError(f"--endpoint {url} is no http or https address; {example}")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ConfigError(f"--endpoint {url}: {example}, without /chat/completions")


def _key(name: str) -> str:
    """The key, empty where KEY is not set. No message repeats a value, nor a name that may be a key by mistake."""
    if not _VARIABLE.fullmatch(name):
        raise ConfigError("--key-env takes the name of an environment variable, in capitals, never the key itself")
    found = os.environ.get(name, "").strip()
    if not found and name != KEY:
        raise ConfigError(f"--key-env {name}: no such environment variable, or it is empty")
    if not (found.isascii() and found.isprintable() and " " not in found):
        raise ConfigError(f"the key in {name} holds characters that no key has (spaces, line ends, letters not ASCII)")
    return found
