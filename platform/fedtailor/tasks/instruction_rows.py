"""From a row of a data set to an instruction, what was said before it, and the response.

Three shapes of rows are understood (the names are those of the common data sets):

* ``messages``: a list of ``{"role": ..., "content": ...}``; the last assistant message is the response, what follows it
  is left out;
* ``prompt`` and ``completion``: two texts, or two lists of messages;
* ``instruction``, optionally ``input`` or ``context``, and ``response`` or ``output``. Input or context belong to the
  instruction: after it, with an empty line between.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedtailor.core.errors import DataError
from fedtailor.tasks.rows import Row, parse_json

ROLES: tuple[str, ...] = ("system", "user", "assistant")

SHAPES = (
    "'messages' (a list of role and content); 'prompt' and 'completion'; "
    "'instruction' (with 'input' or 'context') and 'response' or 'output'"
)

_CONTEXTS, _RESPONSES = ("input", "context"), ("response", "output")


class Turn(NamedTuple):
    """What is asked and answered.

    Args:
        text: the instruction; of a conversation, its last user message.
        response: the answer to learn; may be blank, see `Dropped`.
        history: the messages before the instruction as JSON, system message included; None if there are none.
    """

    text: str
    response: str
    history: str | None = None


class Dropped:
    """Counts rows without an instruction or a response, which nothing can be learnt from."""

    def __init__(self) -> None:
        self.responses = 0
        self.instructions = 0

    def keeps(self, turn: Turn) -> bool:
        """Whether a turn can be used; counts it if not."""
        blank_response, blank_text = not turn.response.strip(), not turn.text.strip()
        self.responses += blank_response
        self.instructions += blank_text and not blank_response
        return not (blank_response or blank_text)

    @property
    def notes(self) -> dict[str, int]:
        """The counts, for the manifest."""
        return {"dropped_empty_responses": self.responses, "dropped_empty_instructions": self.instructions}


def read_turn(row: Row) -> Turn:
    """The turn of a row of any of the three shapes; a field that is null counts as absent where another shape fits.

    Raises:
        DataError: none of the shapes (names the keys found), or a field of another type; says where.
    """
    where, values = row
    filled = {key: value for key, value in values.items() if value is not None}
    for fields in (filled, values):
        if fields.get("messages") is not None:
            return _conversation(fields["messages"], where)
        if {"prompt", "completion"} <= fields.keys():
            return _completion(fields, where)
        response = next((key for key in _RESPONSES if key in fields), None)
        if response and "instruction" in fields:
            return _instruction(fields, response, where)
    raise DataError(f"{where}: keys {', '.join(map(str, values))} fit none of the shapes: {SHAPES}")


def _instruction(fields: Mapping[str, Any], response: str, where: str) -> Turn:
    text = _text(fields, "instruction", where)
    contexts = [_text(fields, key, where) for key in _CONTEXTS if key in fields]
    return Turn("\n\n".join([text, *(c for c in contexts if c.strip())]), _text(fields, response, where))


def _completion(fields: Mapping[str, Any], where: str) -> Turn:
    prompt, completion = fields["prompt"], fields["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _conversation([*prompt, *completion], where)
    return Turn(_text(fields, "prompt", where), _text(fields, "completion", where))


def _text(fields: Mapping[str, Any], key: str, where: str) -> str:
    value = fields[key]
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a text, this is of type {type(value).__name__}")
    return value or ""


def _conversation(messages: Any, where: str) -> Turn:
    if isinstance(messages, str):  # as tables without nested columns keep them
        messages = parse_json(messages, f"{where}, 'messages'")
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: 'messages' must be a list of at least a user and an assistant message")
    turns = [_message(message, number, where) for number, message in enumerate(messages)]
    ends = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not ends:
        raise DataError(f"{where}: 'messages' holds no assistant message, so there is no response")
    before = turns[: ends[-1]]
    if not before or before[-1]["role"] != "user":
        raise DataError(f"{where}: 'messages' must have a user message right before the last assistant message")
    if any(turn["role"] == "system" for turn in before[1:]):
        raise DataError(f"{where}: a system message can only be the first of 'messages'")
    return Turn(before[-1]["content"], turns[ends[-1]]["content"], _history(before[:-1]))


def _message(message: Any, number: int, where: str) -> dict[str, str]:
    here = f"{where}, message {number}"
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise DataError(f"{here}: a message has a 'role' and a 'content', this is {str(message)[:80]!r}")
    if message["role"] not in ROLES:
        raise DataError(f"{here}: unknown role {message['role']!r}; allowed: {', '.join(ROLES)}")
    return {"role": message["role"], "content": _text(message, "content", here)}


def _history(turns: Sequence[Mapping[str, str]]) -> str | None:
    return json.dumps(turns, ensure_ascii=False) if turns else None
