"""A prompt template: what it is, one given as text, and a tokenizer's own chat template.

The chat template is read so that a response and what surrounds it are known to the character.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError, ModelError

Turn = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": ...}``"""

INSTRUCTION: Final = "{instruction}"

RESPONSE: Final = "{response}"


_MARK: Final = "\ue000response\ue001"

# Llama 3.2's chat template writes today's date into every prompt, and this one where it knows no clock.
_NO_CLOCK: Final = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Layout(NamedTuple):
    """What a template puts around a response: ``prompt + lead + response + closing``.

    Args:
        lead: blanks between the prompt and the response. Tokenizers join a blank with the word behind it, so it is
            learned with the response, and a prompt to be answered ends before it.
        closing: text after the response, its last token the one that ends an answer.
    """

    lead: str
    closing: str


class PromptTemplate(Protocol):
    """A way to write conversations, for one tokenizer."""

    @property
    def layout(self) -> Layout:
        """What surrounds a response."""

    @property
    def chat(self) -> bool:
        """The tokenizer's own template, which writes a begin-of-text token itself where there is to be one."""

    def prompt(self, instruction: str, history: Sequence[Turn] = ()) -> str:
        """The text up to the response."""


@dataclass(frozen=True)
class TextTemplate:
    """A template given as text.

    Args:
        opening: what a conversation starts with; a system message takes its place.
        system: how a system message is written, with one ``{system}``.
        turn: one ``{instruction}`` and one ``{response}``.
        between: what stands between a response and the next turn.
        with_input: form of `turn` with an ``{input}``, for instructions that have a part after an empty line.
        closing: ends a response; None: the tokenizer's EOS.
    """

    opening: str
    system: str
    turn: str
    between: str
    closing: str
    with_input: str | None = None
    input_opening: str = ""
    chat: bool = False

    @property
    def layout(self) -> Layout:
        """What surrounds a response."""
        before = self.turn.partition(RESPONSE)[0]
        return Layout(before[len(before.rstrip(" ")) :], self.closing)

    def prompt(self, instruction: str, history: Sequence[Turn] = ()) -> str:
        """The text up to the response, without the blanks before it."""
        opening, text = "", ""
        for turn in history:
            if turn["role"] == "system":
                opening += self.system.replace("{system}", turn["content"])
            elif turn["role"] == "user":
                text += self._before(turn["content"])
            else:
                text += turn["content"] + self.between
        has_input = self.with_input is not None and "\n\n" in instruction
        opening = opening or (self.input_opening if has_input else self.opening)
        return (opening + text + self._before(instruction)).removesuffix(self.layout.lead)

    def _before(self, instruction: str) -> str:
        first, gap, rest = instruction.partition("\n\n")
        if self.with_input is None or not gap:
            return _fill(self.turn.partition(RESPONSE)[0], INSTRUCTION, instruction)
        before, _, after = self.with_input.partition(RESPONSE)[0].partition("{input}")
        return _fill(before, INSTRUCTION, first) + rest + after


def specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer takes for special tokens wherever they stand, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))


def eos_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends a response.

    Raises:
        ModelError: there is none.
    """
    if tokenizer.eos_token is None:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token, which ends every response; set one")
    return str(tokenizer.eos_token)


def _fill(text: str, slot: str, value: str) -> str:
    before, _, after = text.partition(slot)
    return before + value + after


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
