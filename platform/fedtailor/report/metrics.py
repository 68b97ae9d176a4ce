"""What the clients of a run are scored by: its primary metric, and how every metric is called.

Classification has ``accuracy``. Generation has several measures of the answers; the primary one, which tables rank and
tests compare by, is ROUGE-L, as in FedP2EFT's tables of Fed-Aya. All but the loss lie in [0, 1] and are shown in
percent, their differences in points; more is better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import pandas as pd

from fedtailor.report.names import language_name

LOSS: Final = "loss"
"""Mean cross-entropy in nats, of texts or of response tokens; less is better, and no table ranks by it."""


@dataclass(frozen=True)
class Measure:
    """A metric in words.

    Args:
        name: as in metric rows.
        title: how a heading begins with it; ``phrase``: within a sentence.
        value: what the number of one group is, a sentence without its subject.
        group: what results are split by: ``language``, or ``group`` where the data's groups are no languages.
        own_groups: the examples of one client may belong to several groups, and each counts for its own.
    """

    name: str
    title: str
    phrase: str
    value: str
    group: str = "language"
    own_groups: bool = True

    @property
    def groups(self) -> str:
        """Plural of ``group``."""
        return f"{self.group}s"

    @property
    def mean(self) -> str:
        """What the headline numbers are.

        >>> ROUGE_L.mean
        'mean over languages'
        """
        return f"mean over {self.groups}"

    @property
    def pooling(self) -> str:
        """How a group's examples are brought together, as the subject and verb of a sentence."""
        if not self.own_groups:
            return f"A {self.group} is pooled over its clients"
        return f"A {self.group} is pooled over all test examples in it, whichever client has them"


ACCURACY: Final = Measure(
    "accuracy",
    "Accuracy",
    "accuracy",
    "Correct answers over test examples, pooled over that language's clients",
    own_groups=False,
)

ROUGE_L: Final = Measure("rougeL", "ROUGE-L", "ROUGE-L", "Longest common subsequence of answer and reference, F1")

GENERATION: Final[tuple[Measure, ...]] = (
    Measure("meteor", "METEOR", "METEOR", "Aligned words of answer and reference, weighted towards recall"),
    Measure("rouge1", "ROUGE-1", "ROUGE-1", "Words that answer and reference share, F1"),
    Measure("rouge2", "ROUGE-2", "ROUGE-2", "Pairs of neighbouring words that answer and reference share, F1"),
    ROUGE_L,
    Measure("exact_match", "Exact match", "exact match", "Share of answers that are the reference, spaces aside"),
)
"""Measures of answers, in the order in which tables show them."""

SHARES: Final[Mapping[str, Measure]] = {m.name: m for m in (ACCURACY, *GENERATION)}
"""Metrics of personalised clients that must lie in [0, 1]."""

SCORES: Final[tuple[str, ...]] = (*SHARES, LOSS)
"""All metrics of personalised clients on their test examples."""


def primary(rows: pd.DataFrame) -> Measure:
    """The measure of a run: ``accuracy`` where it has such rows, else ``rougeL``; accuracy for a run without scores.

    Args:
        rows: metric rows; those of the personalising stage are looked at.
    """
    scored = rows[rows["stage"] == "personalise"]
    found = set(scored["metric"])
    if ACCURACY.name in found or ROUGE_L.name not in found:
        return ACCURACY
    return replace(ROUGE_L, group=_group(set(scored.loc[scored["metric"] == ROUGE_L.name, "language"])))


def answer_measures(rows: pd.DataFrame) -> tuple[Measure, ...]:
    """The measures of a generation run, primary one included; empty for classification."""
    main = primary(rows)
    if main.name == ACCURACY.name:
        return ()
    found = set(rows.loc[rows["stage"] == "personalise", "metric"])
    return tuple(replace(measure, group=main.group) for measure in GENERATION if measure.name in found)


def _group(codes: set[str]) -> str:
    """``language`` where Unicode CLDR knows every code."""
    return "language" if all(language_name(code) != code for code in codes) else "group"
