"""One question to an endpoint that speaks OpenAI's chat completions, with a key that nobody else gets to see."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fedtailor.core.errors import ConfigError, JudgeError
from fedtailor.storage.provenance import HIDDEN, scrub

if TYPE_CHECKING:
    import openai

    from fedtailor.report.judge_prompt import Messages


KEY = "OPENAI_API_KEY"

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


@dataclass(frozen=True)
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

    url: str
    model: str
    key_env: str = KEY
    timeout_s: float = 60.0
    retries: int = 5
    _client: openai.OpenAI = field(init=False, repr=False, compare=False)
    _key: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        from openai import OpenAI

        _check_address(self.url)
        key = _key(self.key_env)
        client = OpenAI(api_key=key or "none", base_url=self.url, timeout=self.timeout_s, max_retries=self.retries)
        object.__setattr__(self, "_key", key)
        object.__setattr__(self, "_client", client)

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
