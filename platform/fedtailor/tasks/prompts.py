"""Instruction, earlier turns and response as one text: the built-in templates, a tokenizer's own, a user's file.

`alpaca` and `llama3` are FedP2EFT's (A.2), to the character as the reference code has them (a blank follows
Alpaca's instruction) but for two mistakes: there is one begin-of-text token instead of two, and no newline after the
token that closes the response. `alpaca_input` is Alpaca's second form (Taori et al., 2023).
`alpaca_short` is Alpaca-LoRA's short form (FedDPA, pFedGPT). `plain` adds a line break alone, for data that are no
instructions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import ConfigError, DataError, ModelError, did_you_mean, reported_as

Turn = dict[str, str]
"""``{"role": "system" | "user" | "assistant", "content": ...}``"""

INSTRUCTION: Final = "{instruction}"
RESPONSE: Final = "{response}"
NAMES: Final = ("alpaca", "alpaca_input", "alpaca_short", "llama3", "chat", "plain")
"""Names that ``task.template`` may have, beside ``auto``."""

_MARK: Final = "\ue000response\ue001"

# Llama 3.2's chat template writes today's date into every prompt, and this one where it knows no clock.
_NO_CLOCK: Final = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class TextTemplate:
    """A template given as text; of a sample it makes ``prompt + lead + response + closing``.

    Args:
        turn: one ``{instruction}`` and one ``{response}``.
        closing: text after a response, its last token the one that ends an answer.
        opening: what a conversation starts with; a system message takes its place.
        system: how a system message is written, with one ``{system}``.
        between: what stands between a response and the next turn.
        with_input: form of `turn` with an ``{input}``, for instructions that have a part after an empty line.
        input_opening: its opening.
        chat: the tokenizer's own template, which writes a begin-of-text token itself where there is to be one.
    """

    turn: str
    closing: str
    opening: str = ""
    system: str = "{system}\n\n"
    between: str = "\n\n"
    with_input: str | None = None
    input_opening: str = ""
    chat: bool = False

    @property
    def lead(self) -> str:
        """Blanks between the prompt and the response.

        Tokenizers join a blank with the word behind it, so it is learned with the response, and a prompt to be answered
        ends before it.
        """
        before = self.turn.partition(RESPONSE)[0]
        return before[len(before.rstrip(" ")) :]

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
        return (opening + text + self._before(instruction)).removesuffix(self.lead)

    def _before(self, instruction: str) -> str:
        first, gap, rest = instruction.partition("\n\n")
        if self.with_input is None or not gap:
            before, _, after = self.turn.partition(RESPONSE)[0].partition(INSTRUCTION)
            return before + instruction + after
        before, _, after = self.with_input.partition(RESPONSE)[0].partition(INSTRUCTION)
        between, _, end = after.partition("{input}")
        return before + first + between + rest + end


@dataclass(frozen=True)
class ChatTemplate:
    """The tokenizer's own chat template, read so that what surrounds a response is known; it never sees a clock.

    Args:
        tokenizer: whose template it is.
        jinja: the template.
        lead: see `TextTemplate`, as `closing` and `chat`.
        exact: its prompt for an answer is what it writes before an answer that is there.
    """

    tokenizer: PreTrainedTokenizerBase
    jinja: str
    lead: str = ""
    closing: str = ""
    exact: bool = True
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
                f"allowed for it: alpaca, alpaca_input, alpaca_short, plain, auto, or a file"
            )
        jinja = tokenizer.get_chat_template()
        form = cls(tokenizer, _NO_CLOCK + jinja if "strftime_now" in jinja else jinja)
        asked = form._written([_user("a")], True)
        before, mark, after = form._answered([_user("a")]).partition(_MARK)
        if not mark:
            raise ModelError(f"the chat template of {tokenizer.name_or_path!r} leaves the assistant's words out")
        exact = before.startswith(asked) and not before[len(asked) :].strip()
        lead = before[len(asked.rstrip(" ")) if exact else len(before.rstrip(" ")) :]
        return replace(form, lead=lead, closing=_closing(after, tokenizer), exact=exact)

    def prompt(self, instruction: str, history: Sequence[Turn] = ()) -> str:
        """The text up to the response, without the blanks before it."""
        turns = [*history, _user(instruction)]
        text = self._written(turns, True) if self.exact else self._answered(turns).partition(_MARK)[0]
        return text.rstrip(" ")

    def _answered(self, turns: list[Turn]) -> str:
        return self._written([*turns, {"role": "assistant", "content": _MARK}], False)

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


PromptTemplate = TextTemplate | ChatTemplate
"""A way to write conversations, for one tokenizer."""

_ALPACA: Final = TextTemplate(
    turn="### Instruction:\n{instruction} \n\n### Response: {response}",
    closing="",
    opening="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n",
)

_BUILT_IN: Final = {
    "alpaca": _ALPACA,
    "alpaca_input": replace(
        _ALPACA,
        with_input="### Instruction:\n{instruction} \n\n### Input:\n{input} \n\n### Response: {response}",
        input_opening="Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n",
    ),
    "alpaca_short": TextTemplate(turn="### Instruction:\n{instruction}\n\n### Response:\n{response}", closing=""),
    "llama3": TextTemplate(
        turn="<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n{response}",
        closing="<|eot_id|>",
        system="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
        between="<|eot_id|>",
    ),
    "plain": TextTemplate(turn="{instruction}\n{response}", closing=""),
}
"""Templates by name; one without a closing of its own closes with the tokenizer's EOS."""


def template_for(template: str, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template of this name or file for a tokenizer.

    Raises:
        ConfigError: see `check_name`.
        ModelError: the tokenizer lacks what it needs: a chat template, Llama 3's header tokens, EOS.
    """
    name = resolve(template, tokenizer)
    if name == "chat":
        return ChatTemplate.of(tokenizer)
    if name in _BUILT_IN:
        needed = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>") if name == "llama3" else ()
        if missing := [token for token in needed if token not in specials(tokenizer)]:
            raise ModelError(
                f"'task.template' is 'llama3', but the tokenizer {tokenizer.name_or_path!r} has no special token "
                f"{', '.join(missing)}; allowed for it: alpaca, alpaca_input, alpaca_short, auto, or a file"
            )
        return replace(_BUILT_IN[name], closing=_closing(_BUILT_IN[name].closing, tokenizer))
    turn, slot, tail = _slots(name).partition(RESPONSE)
    return TextTemplate(turn + slot, _closing(tail, tokenizer), between=tail if tail.strip() else "\n\n")


def resolve(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that ``auto`` stands for: ``chat`` where the tokenizer has one, else ``alpaca``."""
    if template != "auto":
        return template
    return "chat" if tokenizer.chat_template else "alpaca"


def check_name(template: str) -> None:
    """Checks ``task.template`` as far as no tokenizer is needed.

    Raises:
        ConfigError: neither a name nor a file, or a file without one slot for each of instruction and response.
    """
    if template not in (*NAMES, "auto"):
        _slots(template)


def identity(template: str) -> str:
    """What names a template in hashes: its name, or the hash of its text.

    Raises:
        ConfigError: see `check_name`.
    """
    if template in (*NAMES, "auto"):
        return template
    return f"text-{hashlib.sha256(_slots(template).encode()).hexdigest()[:16]}"


def specials(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts that the tokenizer takes for special tokens wherever they stand, the longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted(added | set(tokenizer.all_special_tokens), key=lambda text: (-len(text), text))


def _user(content: str) -> Turn:
    return {"role": "user", "content": content}


def _closing(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """What follows a response, with the tokenizer's EOS where it does not end in a special token of its own."""
    closing = text.strip()
    if closing.endswith(tuple(specials(tokenizer))):
        return closing
    if tokenizer.eos_token is None:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no EOS token, which ends every response; set one")
    return closing + str(tokenizer.eos_token)


def _slots(path: str) -> str:
    """A user's template, read and checked."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"'task.template' is {path!r}, allowed: {', '.join(NAMES)}, auto, or a text file (there is none here) "
            f"with the slots {INSTRUCTION} and {RESPONSE}{did_you_mean(path, (*NAMES, 'auto'))}"
        )
    with reported_as(ConfigError, f"'task.template': cannot read {path}", OSError, UnicodeDecodeError):
        text = file.read_text(encoding="utf-8").rstrip("\n")
    for slot in (INSTRUCTION, RESPONSE):
        if text.count(slot) != 1:
            raise ConfigError(f"'task.template': {path} has {text.count(slot)} times the slot {slot}; it needs one")
    if text.index(INSTRUCTION) > text.index(RESPONSE):
        raise ConfigError(f"'task.template': {path} has the slot {RESPONSE} before the slot {INSTRUCTION}")
    return text
