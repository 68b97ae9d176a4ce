"""Questions and their contexts as windows of tokens, with the span to be found and the characters behind each token.

The conventions are those of transformers' question-answering examples (after Devlin et al., 2019): the question first
and whole, then as much of the context as there is room for; a longer context goes on in further windows, of which two
neighbours share some tokens. A window that holds the whole answer has its first and last token as span. In any other
there is nothing to be found: its span is the token that begins a text, twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import DataError, ModelError
from fedtailor.tasks.encoding import breaker, first_segment
from fedtailor.tasks.source import Example
from fedtailor.tasks.store import BLOCK, TaskData, cells, examples_of, open_stream, write_stream

Ints = npt.NDArray[np.int64]
PlaceOf = Callable[[Example], str]

WINDOWS = pa.schema({
    "question": pa.int32(), "start": pa.int32(), "end": pa.int32(), "context": pa.int32(),
    "characters": pa.large_list(pa.int32()),
})  # fmt: skip
"""windows.arrow: row i belongs to row i of tokens.arrow: the row of contexts.arrow that it is of, its span, its first
token of the context and, of test questions, first character and end of each token from there on."""

CONTEXTS = pa.schema({"question": pa.large_string(), "context": pa.large_string(), "answers": pa.large_string()})
"""contexts.arrow: row i is row i of texts.arrow."""


class Window(NamedTuple):
    """A question and a part of its context.

    Args:
        question: its number in the block that was encoded.
        ids: (length,) int32.
        first: tokens of the first segment.
        span: first and last token of the answer; (0, 0): it is not here.
        context: number of the first token of the context.
        characters: (n, 2) int64: where in the context each of its tokens here begins and ends.
    """

    question: int
    ids: npt.NDArray[np.int32]
    first: int
    span: tuple[int, int]
    context: int
    characters: Ints


@dataclass(frozen=True)
class Question:
    """What is to be answered by spans of its windows.

    Args:
        text: the question.
        context: where its answer is.
        answers: each right one; none where the context has no answer.
        rows: its windows' numbers among the client's.
        starts: of each window, the number of its context's first token.
        characters: of each window, see `Window.characters`.
    """

    text: str
    context: str
    answers: tuple[str, ...]
    rows: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    characters: list[Ints] = field(default_factory=list)


def check_windows(tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int) -> None:
    """Checks that a tokenizer can cut contexts into windows and say where their tokens are.

    Raises:
        ModelError: it cannot, its texts do not begin with a token of their own, or windows would not move on.
    """
    name = tokenizer.name_or_path
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer does not say which characters a token stands for; give a fast one")
    if tokenizer.cls_token_id is None or tokenizer("a", "b")["input_ids"][0] != tokenizer.cls_token_id:
        raise ModelError(
            f"{name}: its tokenizer puts no token of its own before a text ('cls_token'), which stands for 'no answer'"
        )
    special = tokenizer.num_special_tokens_to_add(pair=True)
    if stride >= max_length - special - 1:
        raise ModelError(
            f"'task.stride' ({stride}) leaves no room for a question: 'task.max_length' is {max_length} and the "
            f"tokenizer adds {special} special tokens (allowed: 0 ... {max(0, max_length - special - 2)})"
        )


def encode_windows(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], contexts: Sequence[str],
    answers: Sequence[tuple[int, int] | None], max_length: int, stride: int,
) -> Iterator[Window]:  # fmt: skip
    """Windows of questions that leave room for more than ``stride`` tokens, in order; see `rooms`.

    Args:
        tokenizer: see `check_windows`.
        questions: their texts.
        contexts: of each.
        answers: first character and end of each one's answer in its context.
        max_length: most tokens of a window, special tokens included.
        stride: tokens that neighbouring windows share.
    """
    segments, plain = "token_type_ids" in tokenizer.model_input_names, breaker(tokenizer)
    told = list(map(plain, contexts))
    found = tokenizer(
        [plain(text.lstrip()) for text in questions], told, truncation="only_second", max_length=max_length,
        stride=stride, return_overflowing_tokens=True, return_offsets_mapping=True, return_attention_mask=False,
        return_token_type_ids=segments, verbose=False,
    )  # fmt: skip
    for number, row in enumerate(found["overflow_to_sample_mapping"]):
        parts = found.sequence_ids(number)
        first = next((i for i, part in enumerate(parts) if part == 1), len(parts))
        count = sum(part == 1 for part in parts)
        characters = np.array(found["offset_mapping"][number][first : first + count], np.int64).reshape(-1, 2)
        if told[row] != contexts[row]:
            characters = _before(contexts[row], told[row])[characters]
        ids = np.array(found["input_ids"][number], dtype=np.int32)
        segment = first_segment(tokenizer, found["token_type_ids"][number]) if segments else len(ids)
        yield Window(row, ids, segment, _span(characters, answers[row], first), first, characters)


def rooms(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], max_length: int) -> Ints:
    """Tokens of the context that a window has room for beside each question, (n,)."""
    texts = [breaker(tokenizer)(text.lstrip()) for text in questions]
    own = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return max_length - tokenizer.num_special_tokens_to_add(pair=True) - np.array([len(ids) for ids in own], np.int64)


def _before(text: str, broken: str) -> Ints:
    """Of each place of a text into which blanks were put, and of its end, the place without them."""
    at = np.zeros(len(broken) + 1, np.int64)
    for place, letter in enumerate(broken):
        at[place + 1] = at[place] + (at[place] < len(text) and text[at[place]] == letter)
    return at


def _span(characters: Ints, answer: tuple[int, int] | None, first: int) -> tuple[int, int]:
    """First and last token of an answer that is wholly among these tokens; else (0, 0)."""
    if answer is None or not len(characters) or characters[0, 0] > answer[0] or characters[-1, 1] < answer[1]:
        return 0, 0
    start = int(np.argmax(characters[:, 1] > answer[0]))
    end = len(characters) - 1 - int(np.argmax(characters[::-1, 0] < answer[1]))
    return (first + start, first + end) if start <= end else (0, 0)


class Writer:
    """Writes windows.arrow and contexts.arrow of a task, and gives the blocks of tokens.arrow.

    Args:
        data: the task.
        tokenizer: see `check_windows`.
        max_length: most tokens of a window.
        stride: tokens that neighbouring windows share.
        place_of: says for messages where an example is.
    """

    def __init__(
        self, data: TaskData, tokenizer: PreTrainedTokenizerBase, max_length: int, stride: int, place_of: PlaceOf | None
    ) -> None:
        check_windows(tokenizer, max_length, stride)
        self._data, self._tokenizer, self._place_of = data, tokenizer, place_of
        self._limits = max_length, stride
        self._sides: list[tuple[int, int, int, int, Ints]] = []
        self._lengths: list[int] = []
        self.notes: dict[str, Any] = {"kind": "extraction", "stride": stride, "questions": data.manifest["rows"]}

    def batches(self, schema: pa.Schema, digest: Any) -> Iterator[pa.RecordBatch]:
        """Blocks of tokens.arrow with ``first`` where the schema has it; `digest` takes their content in.

        Raises:
            DataError: a question leaves no room for its context, or an answer is longer than that; names the first.
        """
        windows = self._windows()
        while block := list(islice(windows, BLOCK)):
            for one, _ in block:
                digest.update(len(one.ids).to_bytes(4, "little") + one.ids.tobytes() + np.array(one.span).tobytes())
            columns = ([one.ids for one, _ in block], [topic for _, topic in block], [one.first for one, _ in block])
            yield pa.record_batch(list(columns[: len(schema)]), schema=schema)

    def _windows(self) -> Iterator[tuple[Window, int]]:
        """Each window with its topic; notes what windows.arrow holds."""
        tokenizer, (max_length, stride) = self._tokenizer, self._limits
        missed, answered = 0, 0
        for number, batch in enumerate(self._data.batches):
            texts, contexts, given, labels, splits = (
                batch.column(name).to_pylist() for name in ("text", "pair", "answers", "label", "split")
            )
            room = rooms(tokenizer, texts, max_length)
            answers = [json.loads(spans) for spans in given]
            first = [(a[0]["start"], a[0]["start"] + len(a[0]["text"])) if a else None for a in answers]
            told = f"question leaves {{}} tokens of a window to its context, and 'task.stride' ({stride}) must be below"
            self._refuse(room <= stride, batch, told, room)
            whole = set()
            for one in encode_windows(tokenizer, texts, contexts, first, max_length, stride):
                whole |= {one.question} if one.span != (0, 0) else set()
                kept = one.characters if splits[one.question] == "test" else one.characters[:0]
                self._sides.append((number * BLOCK + one.question, *one.span, one.context, kept))
                self._lengths.append(len(one.ids))
                yield one, labels[one.question]
            lost = [i for i, answer in enumerate(first) if answer is not None and i not in whole]
            sizes = np.zeros(len(texts), np.int64)
            for i in lost:
                sizes[i] = len(tokenizer(answers[i][0]["text"], add_special_tokens=False, verbose=False)["input_ids"])
            told = "answer is longer than a window has room for beside its question ({} tokens)"
            self._refuse(sizes > room, batch, told, room)
            missed, answered = missed + len(lost), answered + sum(map(bool, answers))
        self.notes |= {"answers_in_no_window": missed, "unanswerable": answered < self._data.manifest["rows"]}

    def _refuse(self, wrong: npt.NDArray[np.bool_], batch: pa.RecordBatch, told: str, numbers: Ints) -> None:
        if not wrong.any():
            return
        at = int(np.argmax(wrong))
        example = next(islice(examples_of(batch), at, None))
        where = (self._place_of(example) if self._place_of else "") or f"question {example.text!r}"
        raise DataError(
            f"{where}: its {told.format(numbers[at])}; {int(wrong.sum())} of {len(wrong)} questions are so; raise "
            f"'task.max_length' ({self._limits[0]})"
        )

    def write(self, out: Path, rows: Sequence[Sequence[Ints]]) -> tuple[Ints, list[list[Ints]]]:
        """Writes both tables, once `batches` have been taken.

        Args:
            out: the folder.
            rows: of each client and split, its rows of the task's table.

        Returns:
            Tokens of each window, (W,), and of each client and split its windows' rows.
        """
        blocks = (self._sides[at : at + BLOCK] for at in range(0, len(self._sides), BLOCK))
        columns = ([list(column) for column in zip(*block, strict=True)] for block in blocks)
        write_stream(
            out / "windows.arrow", WINDOWS,
            (pa.record_batch([*own, [each.ravel() for each in last]], schema=WINDOWS) for *own, last in columns),
        )  # fmt: skip
        texts = ([batch.column(name) for name in ("text", "pair", "answers")] for batch in self._data.batches)
        write_stream(out / "contexts.arrow", CONTEXTS, (pa.record_batch(each, schema=CONTEXTS) for each in texts))
        first = np.searchsorted([side[0] for side in self._sides], np.arange(self._data.manifest["rows"] + 1))
        windows = [
            [np.concatenate([np.arange(first[row], first[row + 1]) for row in part]) for part in parts]
            for parts in rows
        ]
        return np.array(self._lengths, np.int64), windows


class WindowTable:
    """windows.arrow and contexts.arrow, opened read-only.

    Args:
        folder: of the tokens.
        windows: rows of the former.
        questions: rows of the latter.
    """

    def __init__(self, folder: Path, windows: int, questions: int) -> None:
        self._batches = open_stream(folder / "windows.arrow", windows)
        self._contexts = open_stream(folder / "contexts.arrow", questions)
        names = ("question", "start", "end", "context")
        held = [[batch.column(name).to_numpy() for name in names] for batch in self._batches]
        self.question, self._start, self._end, self._first = (
            np.concatenate(column).astype(np.int64) for column in zip(*held, strict=True)
        )

    def spans(self, rows: Ints) -> Ints:
        """First and last token of each window's answer, (n, 2)."""
        return np.stack([self._start[rows], self._end[rows]], 1)

    def questions(self, rows: Ints) -> list[Question]:
        """The questions of test windows, in the order of their first ones."""
        numbers = self.question[rows]
        own = np.array(list(dict.fromkeys(numbers.tolist())), np.int64)
        columns = (cells(self._contexts, name, own) for name in CONTEXTS.names)
        found = {
            number: Question(text, context, tuple(answer["text"] for answer in json.loads(answers)))
            for number, text, context, answers in zip(own.tolist(), *columns, strict=True)
        }
        characters = cells(self._batches, "characters", rows)
        for at, (number, row) in enumerate(zip(numbers.tolist(), rows.tolist(), strict=True)):
            found[number].rows.append(at)
            found[number].starts.append(int(self._first[row]))
            found[number].characters.append(np.array(characters[at], np.int64).reshape(-1, 2))
        return list(found.values())
