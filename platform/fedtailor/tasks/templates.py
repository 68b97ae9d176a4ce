"""From instruction and response to tokens, by a prompt template: what is given, what is learned, what is cut.

The prompt is encoded by itself, so that a model is trained on the very tokens that it will be asked with. The response
then gets the tokens that it has behind the prompt in the joint text. Where a tokenizer would join the prompt's end with
the response's beginning (a template that ends in newlines, an answer that begins with one), the response is encoded
without the prompt instead: the boundary between prompt and response is always one between tokens, and a token is
learned if and only if it is the response's. No text is searched for markers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import ModelError
from fedtailor.tasks.prompt_template import PromptTemplate, Turn, specials
from fedtailor.tasks.prompts import template_for

Ids = npt.NDArray[np.int32]

Overlong = Literal["cut_prompt", "drop"]

Cut = Literal["prompt", "response"]


class Sample(NamedTuple):
    """An instruction, its response (None: to be answered) and the turns before, oldest first."""

    instruction: str
    response: str | None = None
    history: tuple[Turn, ...] = ()


@dataclass(frozen=True)
class Encoded:
    """An instruction as tokens.

    Args:
        ids: (length,) int32, prompt, then response and closing token.
        prompt_tokens: how many of them are the prompt.
        cut: what was shortened: the ``prompt`` (its oldest turns, then the instruction's end) and the ``response``
            (its end; the closing token is absent then, since the answer does not end there).
    """

    ids: Ids
    prompt_tokens: int
    cut: tuple[Cut, ...] = ()


def render(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    instruction: str,
    history: Sequence[Turn] = (),
    response: str | None = None,
) -> tuple[str, str]:
    """A sample as text: the prompt, and what is learned after it, closing token included (empty without a response).

    Raises:
        ConfigError, ModelError: see `prompts.template_for`.
        DataError: the tokenizer's chat template refuses the conversation.
    """
    return Encoder.of(template, tokenizer, 4).render(Sample(instruction, response, tuple(history)))


def encode(
    template: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    max_length: int,
    overlong: Overlong = "cut_prompt",
) -> list[Encoded | None]:
    """Samples as tokens; None where one was dropped.

    Raises:
        ConfigError, ModelError: see `prompts.template_for`; max_length leaves no room beside the template.
        DataError: the tokenizer's chat template refuses a conversation.
    """
    encoder = Encoder.of(template, tokenizer, max_length, overlong)
    encoder.check_room()
    return encoder.encode(samples)


@dataclass(frozen=True)
class Encoder:
    """A template and a tokenizer, with what depends on nothing else worked out once.

    Args:
        bos: the begin-of-text token in front of every prompt, none or one.
        closing: tokens after a response.
    """

    template: PromptTemplate
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    overlong: Overlong
    bos: tuple[int, ...]
    closing: tuple[int, ...]

    @classmethod
    def of(
        cls, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: Overlong = "cut_prompt"
    ) -> Encoder:
        """See `encode`."""
        form = template_for(template, tokenizer)
        closing = tokenizer(form.layout.closing, add_special_tokens=False)["input_ids"]
        return cls(form, tokenizer, max_length, overlong, _bos(tokenizer, form), tuple(closing))

    def render(self, sample: Sample) -> tuple[str, str]:
        """See the function of this name."""
        prompt = self._prompt(self._plain(sample))
        if sample.response is None:
            return prompt, ""
        return prompt, self._completion(self._plain(sample)) + self.template.layout.closing

    def check_room(self) -> None:
        """Checks that the template fits with one token of an instruction and one of a response.

        Raises:
            ModelError: it does not.
        """
        least = self._bare + len(self.closing)
        if least + 2 > self.max_length:
            raise ModelError(
                f"'task.max_length' is {self.max_length}, but the template alone takes {least} tokens; "
                f"allowed: at least {least + 2}"
            )

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | None]:
        """See the function of this name."""
        samples = [self._plain(sample) for sample in samples]
        prompts = [self._prompt(sample) for sample in samples]
        heads = self._ids(prompts)
        tails = self._responses(prompts, heads, [self._completion(sample) for sample in samples])
        encoded: list[Encoded | None] = []
        for sample, head, tail in zip(samples, heads, tails, strict=True):
            closing = [] if sample.response is None else list(self.closing)
            if len(head) + len(tail) + len(closing) <= self.max_length - len(self._missing_bos(head)):
                encoded.append(self._joined(head, [*tail, *closing], ()))
            elif self.overlong == "drop":
                encoded.append(None)
            else:
                encoded.append(self._cut(sample, head, [*tail, *closing]))
        return encoded

    def _cut(self, sample: Sample, head: list[int], tail: list[int]) -> Encoded:
        """Drops the oldest turns, cuts the instruction's end, then the response's, until all fit."""
        cut: list[Cut] = []
        room = self.max_length - self._bare
        # A response that fits beside the bare template costs the instruction; a longer one is cut anyway, and
        # then takes no more than half from an instruction that could use it.
        share = room - len(tail) if len(tail) < room else room // 2
        limit = self._bare + share
        while sample.history and self._length(head) > limit:
            sample = sample._replace(history=_shorter(sample.history))
            head = self._ids([self._prompt(sample)])[0]
            cut = ["prompt"]
        if self._length(head) > limit:
            head, cut = self._shortened(sample, limit), ["prompt"]
        left = self.max_length - self._length(head)
        if len(tail) > left:
            tail = tail[: min(left, len(tail) - len(self.closing))]
            cut.append("response")
        return self._joined(head, tail, tuple(cut))

    def _shortened(self, sample: Sample, limit: int) -> list[int]:
        """The prompt with as much of the instruction's beginning as `limit` tokens allow."""
        shortest, longest = 0, len(sample.instruction)
        best = self._ids([self._prompt(sample._replace(instruction=""))])[0]
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            tried = self._ids([self._prompt(sample._replace(instruction=sample.instruction[:middle]))])[0]
            if self._length(tried) <= limit:
                shortest, best = middle, tried
            else:
                longest = middle - 1
        return best

    def _responses(self, prompts: Sequence[str], heads: list[list[int]], texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each response behind its prompt."""
        joint = self._ids([prompt + text for prompt, text in zip(prompts, texts, strict=True)])
        return [
            ids[len(head) :] if ids[: len(head)] == head else self._apart(text)
            for head, ids, text in zip(heads, joint, texts, strict=True)
        ]

    def _apart(self, text: str) -> list[int]:
        """Tokens of a text that would merge with what comes before it.

        SentencePiece puts a blank before whatever begins a text, hence the attempts to let something else begin.
        """
        for before in (":", "\n"):
            start, both = self._ids([before, before + text])
            if both[: len(start)] == start:
                return both[len(start) :]
        return self._ids([text])[0]

    def _prompt(self, sample: Sample) -> str:
        return self.template.prompt(sample.instruction, sample.history)

    def _completion(self, sample: Sample) -> str:
        return self.template.layout.lead + sample.response if sample.response else ""

    def _plain(self, sample: Sample) -> Sample:
        """The sample with the names of special tokens broken by a blank: data must not end or begin a text."""
        history = tuple({**turn, "content": self._broken(turn["content"])} for turn in sample.history)
        response = None if sample.response is None else self._broken(sample.response)
        return Sample(self._broken(sample.instruction), response, history)

    def _broken(self, text: str) -> str:
        return self._names.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text)

    @cached_property
    def _names(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, specials(self.tokenizer))) or r"(?!)")

    @cached_property
    def _bare(self) -> int:
        """Tokens of the prompt of an empty instruction."""
        return self._length(self._ids([self.template.prompt("")])[0])

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Texts above the model's length are cut later: the tokenizer need not warn of them.
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        found: list[list[int]] = (
            self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"] if texts else []
        )
        return found

    def _missing_bos(self, head: list[int]) -> list[int]:
        return [] if tuple(head[:1]) == self.bos else list(self.bos)

    def _length(self, head: list[int]) -> int:
        return len(self._missing_bos(head)) + len(head)

    def _joined(self, head: list[int], tail: list[int], cut: tuple[Cut, ...]) -> Encoded:
        head = [*self._missing_bos(head), *head]
        return Encoded(np.array([*head, *tail], dtype=np.int32), len(head), cut)


def _bos(tokenizer: PreTrainedTokenizerBase, template: PromptTemplate) -> tuple[int, ...]:
    """One BOS where the tokenizer has one; of chat templates, those that say nothing about it go by the tokenizer.

    A BOS that is the EOS and that the tokenizer itself does not use (GPT-2) counts as none.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return ()
    if tokenizer("a")["input_ids"][:1] == [bos]:
        return (int(bos),)
    written = template.prompt("").startswith(str(tokenizer.bos_token))
    own = bos != tokenizer.eos_token_id and not template.chat
    return (int(bos),) if written or own else ()


def _shorter(history: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The history without its oldest question and answer; the system message goes last."""
    system = history[: int(history[0]["role"] == "system")]
    turns = history[len(system) :]
    if not turns:
        return ()
    later = next((i for i, turn in enumerate(turns) if i and turn["role"] == "user"), len(turns))
    return system + turns[later:]
