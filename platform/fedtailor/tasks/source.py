"""A task's labelled texts by pool and language or by client before they are partitioned."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import regex

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig

Pool = Literal["seen", "unseen"]
Split = Literal["train", "test"]
TaskKind = Literal["classification", "generation", "regression", "extraction"]
ClassScore = Literal["accuracy", "mcc"]
POOLS: tuple[Pool, ...] = ("seen", "unseen")
SPLITS: tuple[Split, ...] = ("train", "test")

_PIECE = regex.compile(r"[\p{L}\p{M}\p{N}]+|[^\s\p{L}\p{M}\p{N}]")


class Example(NamedTuple):
    """One text, or a pair of texts, and its class index."""

    text: str
    label: int
    pair: str | None = None
    """The second text (hypothesis) of a sentence-pair task; the response of an instruction."""
    history: str | None = None
    """Earlier turns of a conversation, system message included: JSON of ``[{"role": ..., "content": ...}, ...]``."""
    others: tuple[str, ...] = ()
    """Of a test instruction: further responses that are as right as ``pair``."""
    answers: str | None = None
    """Of a question (`text`) to a context (`pair`), its spans: JSON of ``[{"text": ..., "start": ...}, ...]``."""

    @property
    def normal(self) -> str:
        """The form in which two examples count as the same, whatever their labels: see `normalise`."""
        normal = normalise(self.text)
        return normal if self.pair is None else f"{normal}\0{normalise(self.pair)}"


@dataclass(frozen=True)
class LanguagePool:
    """The texts of one language in one pool, in a fixed order."""

    train: Sequence[Example]
    test: Sequence[Example]

    def split(self, name: Split) -> Sequence[Example]:
        """The texts of one split."""
        return self.train if name == "train" else self.test


@dataclass(frozen=True)
class NaturalClient:
    """A client that the data itself names (annotator, category), with its examples in a fixed order.

    Args:
        name: last part of the client's id ``pool/language/name``, without a slash.
        pool: ``seen`` or ``unseen``.
        language: the group that most of its examples belong to.
        train: examples to learn from.
        test: examples to be judged by.
    """

    name: str
    pool: Pool
    language: str
    train: Sequence[Example]
    test: Sequence[Example]

    @property
    def id(self) -> str:
        """``seen/eng/17``."""
        return f"{self.pool}/{self.language}/{self.name}"

    def split(self, name: Split) -> Sequence[Example]:
        """The examples of one split."""
        return self.train if name == "train" else self.test


@dataclass(frozen=True)
class Source:
    """All texts of a task, by language (`pools`, dealt to clients later) or by client (`natural_clients`).

    Args:
        labels: class names; a label is an index into them. Of instructions: the groups (languages, categories) that
            results are reported by, each example belonging to one. Of extraction: the topics, which are dealt like
            classes.
        pools: pool -> language -> texts. A class that a language lacks is legal.
        notes: counts of what was dropped or found, and rules that were followed, for the manifest.
        disjoint: the source promises that no normalised text occurs in two pools or two splits.
        kind: ``classification`` (text to class), ``generation`` (instruction to response), ``regression`` (numbers to
            numbers, a text each: "0.1 -0.2 | 0.3") or ``extraction`` (question and context to a span of the context).
        natural_clients: the clients, where the data names them; `pools` is empty then.
        columns: of a user's own table: what was taken from which column (``text``, ``label``, ``client``, ...).
        score: of classes, what results are compared by: ``accuracy``, or ``mcc`` beside it (Matthews correlation).
        label_answers: of instructions, groups whose responses are labels, with these: answers are scored as labels.
        truth: of made-up regressions, each client's W, (inputs, outputs), by which its rows were made.
    """

    labels: tuple[str, ...]
    pools: Mapping[Pool, Mapping[str, LanguagePool]] = field(default_factory=dict)
    notes: Mapping[str, int | str] = field(default_factory=dict)
    disjoint: bool = False
    kind: TaskKind = "classification"
    natural_clients: tuple[NaturalClient, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    score: ClassScore = "accuracy"
    label_answers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    truth: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)

    @property
    def paired(self) -> bool:
        """The examples are pairs of texts, as instructions and their responses are.

        Raises:
            DataError: some are and some are not.
        """
        kinds = {e.pair is not None for _, _, part in self.parts() for s in SPLITS for e in part.split(s)}
        if len(kinds) > 1:
            raise DataError("some examples are pairs of texts and some are single texts; a task has one kind")
        return kinds == {True}

    @property
    def several(self) -> bool:
        """Some instructions have more than one right response."""
        return any(e.others for _, _, part in self.parts() for e in part.split("test"))

    def parts(self) -> Iterator[tuple[Pool, str, LanguagePool | NaturalClient]]:
        """(pool, language, texts), seen before unseen, languages by alphabet, or natural clients in their order."""
        for pool in POOLS:
            yield from ((pool, client.language, client) for client in self.natural_clients if client.pool == pool)
            for language in sorted(self.pools.get(pool, {})):
                yield pool, language, self.pools[pool][language]


def all_seen(source: Source) -> Source:
    """The same texts, those of the unseen pool after the seen pool's: there is one pool."""
    languages = {language for _, language, _ in source.parts()}
    held = {
        language: [part for pool in POOLS if (part := source.pools.get(pool, {}).get(language))]
        for language in languages
    }
    merged = {
        language: LanguagePool(*([e for part in parts for e in part.split(split)] for split in SPLITS))
        for language, parts in held.items()
    }
    return replace(source, pools={"seen": merged})


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case-folded, white space collapsed.

    >>> normalise("  Sao\\u00a0Tome  ") == normalise("SAO TOME")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())


def spaced(text: str) -> str:
    """A text with one blank between words and every punctuation mark, whatever blanks it had.

    >>> spaced("It's £20-25, isn't it?") == spaced("It 's £ 20 - 25 , isn 't it ?")
    True
    """
    return " ".join(_PIECE.findall(text))


def look_alikes(names: Iterable[str]) -> Sequence[str]:
    """Names that are the same once normalised, together.

    >>> look_alikes(["Ana", "ben", "ana", "Ben Li"])
    ['Ana, ana']
    """
    same: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        same.setdefault(normalise(name), []).append(name)
    return [", ".join(group) for group in same.values() if len(group) > 1]


@dataclass(frozen=True)
class TaskEntry:
    """What the platform knows of a task without its data: its row of the TASKS table, beside it in its file.

    Args:
        load: (section ``task``, seed) to its texts.
        kind: whether it asks for a class, for a response, for numbers or for a span.
        clients: ``dealt``: as many as are configured; ``natural``: the data names them, so how many there are is known
            once it is loaded; ``either``: natural where the data names them, and known then only.
        label_skew: whether dealt clients have the label skew of ``task.alpha``.
        embedded: whether its data come with the package.
        defaults: what its section sets differently from `TaskConfig`'s own defaults (FedP2EFT A.4).
        published_clients: natural clients as the paper has them, for plans without the data.
        place_of: (section ``task``, example) to where the data have it, e.g. ``data.jsonl, line 3``; it reads them
            again, for messages.
    """

    load: Callable[[TaskConfig, int], Source]
    kind: TaskKind
    clients: Literal["dealt", "natural", "either"] = "dealt"
    label_skew: bool = True
    embedded: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    published_clients: int | None = None
    place_of: Callable[[TaskConfig, Example], str] | None = None


def seeded_halves(examples: Sequence[Example], seed: int, *place: str) -> dict[Pool, list[Example]]:
    """Texts by pool: shuffled by (seed, place), the first half seen, the second unseen."""
    shuffled = [examples[i] for i in numpy_rng(seed, *place).permutation(len(examples))]
    middle = (len(shuffled) + 1) // 2
    return {"seen": shuffled[:middle], "unseen": shuffled[middle:]}


def one_group(
    group: str, parts: Mapping[Split, Sequence[Example]], seed: int, drop_duplicates: bool, *place: str
) -> tuple[dict[Pool, dict[str, LanguagePool]], dict[str, int]]:
    """Pools of a data set whose texts are all of one group, each split halved by (seed, place, split); and notes.

    Test texts that are also train texts are counted, and dropped under ``task.drop_duplicates``.
    """
    trained = {e.normal for e in parts["train"]}
    unknown = [e for e in parts["test"] if e.normal not in trained]
    notes = {"found_duplicates": len(parts["test"]) - len(unknown)}
    if drop_duplicates:
        parts, notes["dropped_duplicates"] = {**parts, "test": unknown}, notes["found_duplicates"]
    halves = {split: seeded_halves(part, seed, *place, split) for split, part in parts.items()}
    return {pool: {group: LanguagePool(halves["train"][pool], halves["test"][pool])} for pool in POOLS}, notes


def check_languages(given: Sequence[str], task: str, allowed: Sequence[str]) -> None:
    """Raises DataError for a language of ``task.languages`` that a task lacks."""
    if unknown := [language for language in given if language not in allowed]:
        raise DataError(f"task.languages: {unknown} not in {task}; allowed: {', '.join(allowed)}")


def check_leakage(source: Source) -> dict[str, int]:
    """Counts normalised texts shared by the pools, and by train and test of each pool, over all languages.

    Of a sentence-pair task, pairs are counted.

    Returns:
        ``leak_seen_unseen``, ``leak_seen_train_test``, ``leak_unseen_train_test``.

    Raises:
        DataError: the source promises disjoint texts and they are not.
    """
    texts: dict[tuple[str, str], set[str]] = {(pool, split): set() for pool in POOLS for split in SPLITS}
    for pool, _, part in source.parts():
        for split in SPLITS:
            texts[pool, split].update(e.normal for e in part.split(split))
    pools = [texts[pool, "train"] | texts[pool, "test"] for pool in POOLS]
    leaks = {"leak_seen_unseen": len(pools[0] & pools[1])}
    for pool in POOLS:
        leaks[f"leak_{pool}_train_test"] = len(texts[pool, "train"] & texts[pool, "test"])
    if source.disjoint and any(leaks.values()):
        raise DataError(f"texts leak between pools or splits: {leaks}")
    return leaks
