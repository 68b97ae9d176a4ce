"""The searches of many clients side by side: what each asks is scored together, and the best mix of each is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedtailor.lanes.batches import Examples, IntArray
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import Known, Points, Search, unknown
from fedtailor.training.validation_rows import ScoredOn

Spread = Callable[[Points], Points]
"""Points of a search (n, d) to the shares of own and received LoRA at each layer, (n, L, 2)."""


@dataclass(frozen=True)
class Choice:
    """What the n clients begin with, and what finding it took.

    Args:
        shares: of own and received LoRA at each layer, (n, L, 2).
        gain: loss of the received LoRA less that of the mix, on the rows that decided, (n,).
        evaluations: mixes that were scored, (n,).
        tokens: of the rows that they were scored on, (n,).
    """

    shares: Points
    gain: Points
    evaluations: Points
    tokens: Points


class Chooser(Protocol):
    """Chooses mixes."""

    def __call__(self, mixtures: Mixtures, lanes: Sequence[int], rows: Sequence[ScoredOn]) -> Choice:
        """The choice of the clients of these lanes.

        Args:
            mixtures: of all clients of the group.
            lanes: which of them choose.
            rows: what each of these is scored on.
        """


def by_group(groups: IntArray) -> Spread:
    """One weight for the layers of a group: w of the client's own LoRA, 1 - w of the received one.

    Args:
        groups: coordinate of each layer's weight, (L,).
    """
    return lambda points: np.stack([points[:, groups], 1 - points[:, groups]], 2)


@dataclass
class Trials:
    """Scores mixes of n clients, and counts.

    Args:
        mixtures: what is scored.
        lanes: the lane of each client.
    """

    mixtures: Mixtures
    lanes: Sequence[int]
    evaluations: Points = field(init=False)
    tokens: Points = field(init=False)

    def __post_init__(self) -> None:
        self.evaluations, self.tokens = np.zeros(len(self.lanes)), np.zeros(len(self.lanes))

    def score(self, asked: Sequence[Points], spread: Sequence[Spread], texts: Sequence[Examples]) -> list[Points]:
        """Losses (n_i,) of the points (n_i, d_i) that each client asks for, all together."""
        numbers = [len(points) for points in asked]
        whose = np.repeat(np.arange(len(asked)), numbers).tolist()
        shares = np.concatenate([to(points) for to, points in zip(spread, asked, strict=True)])
        values = self.mixtures.losses([self.lanes[i] for i in whose], shares, [texts[i] for i in whose])
        self.evaluations += numbers
        self.tokens += [n * int(own.lengths.sum()) for n, own in zip(numbers, texts, strict=True)]
        return np.split(values, np.cumsum(numbers)[:-1])

    def run(
        self, searches: Sequence[Search], spread: Sequence[Spread], texts: Sequence[Examples], count: int, width: int
    ) -> None:
        """Has all searches ask ``count`` points, ``width`` at a time; one that has none left is done."""
        left = [count] * len(searches)
        while True:
            asked = [search.ask(min(width, most)) for search, most in zip(searches, left, strict=True)]
            if not any(map(len, asked)):
                return
            for search, values in zip(searches, self.score(asked, spread, texts), strict=True):
                search.tell(values)
            left = [most - len(points) for most, points in zip(left, asked, strict=True)]

    def best(
        self, known: Sequence[Known], spread: Sequence[Spread], texts: Sequence[Examples], received: Sequence[Points]
    ) -> Choice:
        """The best that is known of each client.

        Args:
            known: of each client, on ``texts``.
            spread: of its points.
            texts: rows of each client.
            received: the point (1, d) that stands for the received LoRA, which is scored where it is not known.
        """
        rest = [unknown(zero, own.x) for zero, own in zip(received, known, strict=True)]
        scored = self.score(rest, spread, texts) if any(map(len, rest)) else [own.y[:0] for own in known]
        shares, gain = [], []
        for own, to, zero, values in zip(known, spread, received, scored, strict=True):
            reference = values if len(values) else own.y[(own.x == zero).all(1)]
            shares.append(to(own.best(1))[0])
            gain.append(reference[0] - own.y.min())
        return Choice(np.stack(shares), np.array(gain), self.evaluations, self.tokens)

    def decided(
        self,
        known: Sequence[Known],
        spread: Sequence[Spread],
        rows: Sequence[ScoredOn],
        top: int,
        always: Sequence[Points],
        received: Sequence[Points],
    ) -> Choice:
        """The best of the ``top`` points, and of those that are ``always`` among them, on all rows of V.

        The received LoRA is scored too, to say what was gained, but chosen only if it is among them.

        Args:
            known: of each client, on few rows.
            spread: of its points.
            rows: of each client.
            top: how many of its best are scored again.
            always: points (m, d) that are scored with them.
            received: the point (1, d) that stands for the received LoRA.
        """
        finals = [unknown(np.concatenate([own.best(top), extra])) for own, extra in zip(known, always, strict=True)]
        rest = [unknown(zero, own) for zero, own in zip(received, finals, strict=True)]
        asked = [np.concatenate(pair) for pair in zip(finals, rest, strict=True)]
        scored = self.score(asked, spread, [own.high for own in rows])
        shares, gain = [], []
        for points, values, own, zero, to in zip(asked, scored, finals, received, spread, strict=True):
            best = int(np.argmin(values[: len(own)]))
            shares.append(to(points[best : best + 1])[0])
            gain.append(values[(points == zero).all(1)][0] - values[best])
        return Choice(np.stack(shares), np.array(gain), self.evaluations, self.tokens)
