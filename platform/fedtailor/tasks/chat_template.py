"""A tokenizer's own chat template, read so that a response and what surrounds it are known to the character."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError, ModelError
from fedtailor.tasks.text_template import Layout, Turn, eos_of, specials

_MARK: Final = "\ue000response\ue001"
# Llama 3.2's chat template writes today's date into every prompt, and this one where it knows no clock.
_NO_CLOCK: Final = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template; it never sees a clock."""

    tokenizer: PreTrainedTokenizerBase
    jinja: str
    layout: Layout
    exact: bool
    """Its prompt for an answer is what it writes before an answer that is there."""
    chat: bool = True

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """Reads off what it puts around a response.

        Raises:
            ModelError: there is none, or it does not write the response as it is.
        """
        if not tokenizer.chat_template:
            raise ModelError(
                f"'task.template' is 'chat', but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
                f"allowed for it: alpaca, alpaca_input, auto, or a file"
            )
        jinja = tokenizer.get_chat_template()
        jinja = _NO_CLOCK + jinja if "strftime_now" in jinja else jinja
        form = cls(tokenizer, jinja, Layout("", ""), exact=True)
        asked = form._written([_user("a")], add_generation_prompt=True)
        before, mark, after = form._written([_user("a"), _answer(_MARK)], add_generation_prompt=False).partition(_MARK)
        if not mark:
            raise ModelError(f"the chat template of {tokenizer.name_or_path!r} leaves the assistant's words out")
        exact = before.startswith(asked) and not before[len(asked) :].strip()
        lead = before[len(asked.rstrip(" ")) if exact else len(before.rstrip(" ")) :]
        closing = after.strip()
        if not closing.endswith(tuple(specials(tokenizer))):
            closing += eos_of(tokenizer)
        return cls(tokenizer, jinja, Layout(lead, closing), exact)

    def prompt(self, instruction: str, history: Sequence[Turn] = ()) -> str:
        """The text up to the response."""
        turns = [*history, _user(instruction)]
        if self.exact:
            return self._written(turns, add_generation_prompt=True).rstrip(" ")
        return self._written([*turns, _answer(_MARK)], add_generation_prompt=False).partition(_MARK)[0].rstrip(" ")

    def _written(self, turns: list[Turn], add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, chat_template=self.jinja, tokenize=False, add_generation_prompt=add_generation_prompt
            )  # type: ignore[assignment]
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"the chat template of {self.tokenizer.name_or_path!r} refuses a conversation of {roles}: {error}"
            ) from error
        return text


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}


def _answer(content: str) -> Turn:
    return {"role": "assistant", "content": content}
