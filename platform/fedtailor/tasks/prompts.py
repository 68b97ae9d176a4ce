"""Instruction, earlier turns and response as one text: the built-in templates, a tokenizer's own, a user's file.

`alpaca` and `llama3` are FedP2EFT's (A.2), to the character as the reference code has them (a blank follows
Alpaca's instruction) but for two mistakes: there is one begin-of-text token instead of two, and no newline after the
token that closes the response. `alpaca_input` is Alpaca's second form (Taori et al., 2023).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import ConfigError, ModelError, did_you_mean
from fedtailor.tasks.prompt_template import (
    INSTRUCTION,
    RESPONSE,
    ChatTemplate,
    PromptTemplate,
    TextTemplate,
    eos_of,
    specials,
)

_LLAMA3_TURN = (
    "<|start_header_id|>user<|end_header_id|>\n\n{instruction}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{response}"
)

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)

_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)

_ALPACA_TURN = "### Instruction:\n{instruction} \n\n### Response: {response}"

_ALPACA_INPUT_TURN = "### Instruction:\n{instruction} \n\n### Input:\n{input} \n\n### Response: {response}"

NAMES: Final = ("alpaca", "alpaca_input", "llama3", "chat")
"""Names that ``task.template`` may have, beside ``auto``."""


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


def template_for(template: str, tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The template of this name or file for a tokenizer.

    Raises:
        ConfigError: see `check_name`.
        ModelError: the tokenizer lacks what it needs: a chat template, Llama 3's header tokens, EOS.
    """
    name = resolve(template, tokenizer)
    if name == "chat":
        return ChatTemplate.of(tokenizer)
    if name == "llama3":
        return _llama3(tokenizer)
    eos = eos_of(tokenizer)
    if name == "alpaca":
        return TextTemplate(_ALPACA, "{system}\n\n", _ALPACA_TURN, "\n\n", eos)
    if name == "alpaca_input":
        return TextTemplate(
            _ALPACA, "{system}\n\n", _ALPACA_TURN, "\n\n", eos, _ALPACA_INPUT_TURN, _ALPACA_INPUT
        )  # fmt: skip
    text = _slots(name)
    turn, slot, tail = text.partition(RESPONSE)
    closing = tail.strip()
    if not closing.endswith(tuple(specials(tokenizer))):
        closing += eos
    return TextTemplate("", "{system}\n\n", turn + slot, tail if tail.strip() else "\n\n", closing)


def resolve(template: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The template that ``auto`` stands for: ``chat`` where the tokenizer has one, else ``alpaca``."""
    if template != "auto":
        return template
    return "chat" if tokenizer.chat_template else "alpaca"


def _llama3(tokenizer: PreTrainedTokenizerBase) -> TextTemplate:
    needed = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    missing = [token for token in needed if token not in specials(tokenizer)]
    if missing:
        raise ModelError(
            f"'task.template' is 'llama3', but the tokenizer {tokenizer.name_or_path!r} has no special token "
            f"{', '.join(missing)}; allowed for it: alpaca, alpaca_input, auto, or a file"
        )
    system = "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
    return TextTemplate("", system, _LLAMA3_TURN, "<|eot_id|>", "<|eot_id|>")


def _slots(path: str) -> str:
    """A user's template, read and checked."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(
            f"'task.template' is {path!r}, allowed: {', '.join(NAMES)}, auto, or a text file (there is none here) "
            f"with the slots {INSTRUCTION} and {RESPONSE}{did_you_mean(path, (*NAMES, 'auto'))}"
        )
    try:
        text = file.read_text(encoding="utf-8").rstrip("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"'task.template': cannot read {path}: {error}") from error
    for slot in (INSTRUCTION, RESPONSE):
        if text.count(slot) != 1:
            raise ConfigError(f"'task.template': {path} has {text.count(slot)} times the slot {slot}; it needs one")
    if text.index(INSTRUCTION) > text.index(RESPONSE):
        raise ConfigError(f"'task.template': {path} has the slot {RESPONSE} before the slot {INSTRUCTION}")
    return text
