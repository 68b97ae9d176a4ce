"""Labelled texts of one task, by pool and language, before they are given to clients."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from fedtailor.core.errors import DataError

Pool = Literal["seen", "unseen"]
Split = Literal["train", "test"]
POOLS: tuple[Pool, ...] = ("seen", "unseen")
SPLITS: tuple[Split, ...] = ("train", "test")


class Example(NamedTuple):
    """One text, or a pair of texts, and its class index."""

    text: str
    label: int
    pair: str | None = None
    """The second text (hypothesis) of a sentence-pair task."""

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
class Source:
    """All texts of a task.

    Args:
        labels: class names; a label is an index into them.
        pools: pool -> language -> texts. A class that a language lacks is legal.
        notes: counts of what was dropped or found, and rules that were followed, for the manifest.
        disjoint: the source promises that no normalised text occurs in two pools or two splits.
    """

    labels: tuple[str, ...]
    pools: Mapping[Pool, Mapping[str, LanguagePool]]
    notes: Mapping[str, int | str] = field(default_factory=dict)
    disjoint: bool = False

    @property
    def paired(self) -> bool:
        """The examples are pairs of texts.

        Raises:
            DataError: some are and some are not.
        """
        kinds = {e.pair is not None for _, _, part in self.parts() for s in SPLITS for e in part.split(s)}
        if len(kinds) > 1:
            raise DataError("some examples are pairs of texts and some are single texts; a task has one kind")
        return kinds == {True}

    def parts(self) -> Iterator[tuple[Pool, str, LanguagePool]]:
        """(pool, language, texts), seen before unseen, languages in alphabetical order."""
        for pool in POOLS:
            for language in sorted(self.pools[pool]):
                yield pool, language, self.pools[pool][language]


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case-folded, white space collapsed.

    >>> normalise("  Sao\\u00a0Tome  ") == normalise("SAO TOME")
    True
    """
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold()).split())
