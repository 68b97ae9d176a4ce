"""From texts, pairs and instructions to token ids, by the tokenizer's own rules.

Of an instruction, prompt and response are encoded apart and joined: a model is trained on the very tokens that it will
be asked with, the boundary between prompt and response is always one between tokens, also where a tokenizer would join
the prompt's end with the response's beginning, and a token is learned if and only if it is the response's. No text is
searched for markers.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import ModelError
from fedtailor.tasks.prompts import Turn, specials, template_for

Ids = npt.NDArray[np.int32]
Overlong = Literal["cut_prompt", "drop"]
Cut = Literal["prompt", "response"]


# ---- texts and pairs -----------------------------------------------------------------------------------------------


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[list[Ids], Ids | None]:
    """Tokens of texts or pairs, cut to `max_length`; of a pair, the longer text is cut first.

    The names of special tokens are words here, see `breaker`.

    Returns:
        Ids of each text, int32 (length,) each; tokens of each pair's first segment, int32 (n,), or None for single
        texts and for tokenizers that do not tell segments apart.

    Raises:
        ModelError: the tokenizer's segments are not two in a row.
    """
    if not len(texts):
        return [], None
    segments = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    plain = breaker(tokenizer)
    encoded = tokenizer(
        list(map(plain, texts)),
        None if pairs is None else list(map(plain, pairs)),
        truncation="longest_first",
        max_length=max_length,
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=segments,
    )
    candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    spare = next(token for token in candidates if token is not None)
    ids = [np.array(row or [spare], dtype=np.int32) for row in encoded["input_ids"]]
    if not segments:
        return ids, None
    return ids, np.array([first_segment(tokenizer, row) for row in encoded["token_type_ids"]], dtype=np.int32)


def first_segment(tokenizer: PreTrainedTokenizerBase, types: Sequence[int]) -> int:
    """Tokens of the first segment: types must be 0, ..., 0, 1, ..., 1."""
    count = sum(kind == 0 for kind in types)
    if list(types) != [0] * count + [1] * (len(types) - count):
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} marks the segments of a pair by {sorted(set(types))}; "
            "only zeros followed by ones are supported"
        )
    return count or 1


def breaker(tokenizer: PreTrainedTokenizerBase) -> Callable[[str], str]:
    """What breaks the names of special tokens by a blank: data must not end, begin or mask a text."""
    names = re.compile("|".join(map(re.escape, specials(tokenizer))) or r"(?!)")
    return lambda text: names.sub(lambda name: f"{name[0][0]} {name[0][1:]}", text)


def check_texts(tokenizer: PreTrainedTokenizerBase, max_length: int, paired: bool) -> None:
    """Checks that a tokenizer can serve.

    Raises:
        ModelError: max_length leaves no room beside special tokens.
    """
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= special:
        raise ModelError(
            f"'task.max_length' is {max_length}, but the tokenizer adds {special} special tokens to a "
            f"{'pair' if paired else 'text'}"
        )


# ---- instructions --------------------------------------------------------------------------------------------------


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


class Encoder:
    """Instructions to tokens, by one template and tokenizer.

    Args:
        template: see ``task.template``.
        tokenizer: of the base model.
        max_length: most tokens of prompt and response.
        overlong: what becomes of longer ones, see ``task.overlong``.

    Raises:
        ConfigError, ModelError: see `prompts.template_for`; max_length leaves no room beside the template for a token
            each of instruction and response.
    """

    def __init__(
        self, template: str, tokenizer: PreTrainedTokenizerBase, max_length: int, overlong: Overlong = "cut_prompt"
    ) -> None:
        self.template = template_for(template, tokenizer)
        self.tokenizer, self.max_length, self.overlong = tokenizer, max_length, overlong
        self.closing: list[int] = self._ids([self.template.closing])[0]
        self._broken = breaker(tokenizer)
        self._bos = self._begin_of_text()
        self._bare = len(self._heads([Sample("")])[0])
        least = self._bare + len(self.closing)
        if least + 2 > max_length:
            raise ModelError(
                f"'task.max_length' is {max_length}, but the template alone takes {least} tokens; "
                f"allowed: at least {least + 2}"
            )

    def encode(self, samples: Sequence[Sample]) -> list[Encoded | None]:
        """Samples as tokens; None where one was dropped.

        Raises:
            DataError: the tokenizer's chat template refuses a conversation.
        """
        samples = [self._plain(sample) for sample in samples]
        heads = self._heads(samples)
        tails = self._inside([self.template.lead + sample.response if sample.response else "" for sample in samples])
        return [self._fitted(*each) for each in zip(samples, heads, tails, strict=True)]

    def _inside(self, texts: list[str]) -> list[list[int]]:
        """Tokens of texts that do not stand at the beginning."""
        start, both, alone = self._ids(["\n", "\na", "a"])
        if both == [*start, *alone]:
            return self._ids(texts)
        return [self._behind_something(text) for text in texts]

    def _behind_something(self, text: str) -> list[int]:
        """SentencePiece puts a blank before whatever begins a text: let something begin that the text does not join."""
        for before in (":", "\n"):
            start, both = self._ids([before, before + text])
            if both[: len(start)] == start:
                return both[len(start) :]
        return self._ids([text])[0]

    def _fitted(self, sample: Sample, head: list[int], tail: list[int]) -> Encoded | None:
        """Drops the oldest turns, cuts the instruction's end, then the response's, until all fit."""
        tail = tail if sample.response is None else [*tail, *self.closing]
        cut: list[Cut] = []
        if len(head) + len(tail) > self.max_length:
            if self.overlong == "drop":
                return None
            room = self.max_length - self._bare
            # A response that fits beside the bare template costs the instruction; a longer one is cut anyway, and
            # then takes no more than half from an instruction that could use it.
            limit = self._bare + (room - len(tail) if len(tail) < room else room // 2)
            if len(head) > limit:
                head, cut = self._shortened(sample, limit), ["prompt"]
            left = self.max_length - len(head)
            if len(tail) > left:
                tail = tail[: min(left, len(tail) - len(self.closing))]
                cut.append("response")
        return Encoded(np.array([*head, *tail], dtype=np.int32), len(head), tuple(cut))

    def _shortened(self, sample: Sample, limit: int) -> list[int]:
        """The prompt with the latest turns, and with as much of the instruction's beginning, as `limit` allows."""
        while sample.history:
            sample = sample._replace(history=_later(sample.history))
            if len(head := self._heads([sample])[0]) <= limit:
                return head

        def beginning(characters: int) -> list[int]:
            return self._heads([sample._replace(instruction=sample.instruction[:characters])])[0]

        lengths = range(len(sample.instruction), 0, -1)
        cut = bisect_left(lengths, -limit, key=lambda characters: -len(beginning(characters)))
        return beginning(len(lengths) - cut)

    def _plain(self, sample: Sample) -> Sample:
        """The sample as plain text."""
        history = tuple({**turn, "content": self._broken(turn["content"])} for turn in sample.history)
        response = None if sample.response is None else self._broken(sample.response)
        return Sample(self._broken(sample.instruction), response, history)

    def _heads(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Tokens of prompts, with the begin-of-text token, once."""
        prompts = self._ids([self.template.prompt(sample.instruction, sample.history) for sample in samples])
        return [ids if ids[: len(self._bos)] == self._bos else self._bos + ids for ids in prompts]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # Texts above the model's length are cut later: the tokenizer need not warn of them.
        options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
        found: list[list[int]] = (
            self.tokenizer(texts, add_special_tokens=False, **options)["input_ids"] if texts else []
        )
        return found

    def _begin_of_text(self) -> list[int]:
        """One BOS where the tokenizer has one; of chat templates, those that say nothing about it go by the tokenizer.

        A BOS that is the EOS and that the tokenizer itself does not use (GPT-2) counts as none.
        """
        bos = self.tokenizer.bos_token_id
        if bos is None:
            return []
        used = self.tokenizer("a")["input_ids"][:1] == [bos]
        written = self.template.prompt("").startswith(str(self.tokenizer.bos_token))
        own = bos != self.tokenizer.eos_token_id and not self.template.chat
        return [int(bos)] if used or written or own else []


def _later(history: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """The history without its oldest question and answer; the system message goes last."""
    system = history[: int(history[0]["role"] == "system")]
    turns = history[len(system) :]
    if not turns:
        return ()
    later = next((i for i, turn in enumerate(turns) if i and turn["role"] == "user"), len(turns))
    return system + turns[later:]
