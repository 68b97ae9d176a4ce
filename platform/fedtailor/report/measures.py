"""What results are measured by, in words, and how a measure of a group comes from its clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Final

import numpy as np
import pandas as pd

from fedtailor.evaluation.classification import matthews

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
        per_client: a group's number is the mean over its clients, each counted once, whatever its examples.
        lowest: least value that it can have; ``highest``: the greatest.
        percent: shown in percent; else as it is.
        least_is_best: the less the better.
    """

    name: str
    title: str
    phrase: str
    value: str
    group: str = "language"
    own_groups: bool = True
    per_client: bool = False
    lowest: float = 0.0
    highest: float = 1.0
    percent: bool = True
    least_is_best: bool = False

    @property
    def ends(self) -> str:
        """``[0, 1]``."""
        return f"[{self.lowest:g}, {self.highest:g}]"

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
        if self.per_client:
            return f"A {self.group}'s score is the mean over its clients, each counted once"
        if not self.own_groups:
            return f"A {self.group} is pooled over its clients"
        return f"A {self.group} is pooled over all test examples in it, whichever client has them"


ACCURACY: Final = Measure(
    "accuracy",
    "Accuracy",
    "accuracy",
    "Correct answers over test examples, pooled over its clients",
    own_groups=False,
)

MCC: Final = Measure(
    "mcc",
    "Matthews correlation",
    "Matthews correlation",
    "Correlation of labels and answers (0 where either are of one class), mean over clients, each counted once",
    own_groups=False,
    per_client=True,
    lowest=-1.0,
)

POOLED_MCC: Final = Measure(
    "mcc_pooled",
    "Pooled Matthews correlation",
    "pooled Matthews correlation",
    "Correlation of labels and answers, of all clients' test examples together",
    own_groups=False,
    lowest=-1.0,
)
"""Of no client alone: it is counted from their confusion matrices."""

CONFUSION: Final = "confusion"
"""Rows of clients' confusion matrices; ``module`` is ``label/answer``."""

_CORPUS: Final = "of each client's answers as a corpus"

ROUGE_L: Final = Measure("rougeL", "ROUGE-L", "ROUGE-L", "Longest common subsequence of answer and reference, F1")

GENERATION: Final[tuple[Measure, ...]] = (
    Measure("meteor", "METEOR", "METEOR", "Aligned words of answer and reference, weighted towards recall"),
    Measure("rouge1", "ROUGE-1", "ROUGE-1", "Words that answer and reference share, F1"),
    Measure("rouge2", "ROUGE-2", "ROUGE-2", "Pairs of neighbouring words that answer and reference share, F1"),
    ROUGE_L,
    Measure("exact_match", "Exact match", "exact match", "Share of answers that are the reference, spaces aside"),
)
"""Measures of answers, in the order in which tables show them."""

LABEL_ACCURACY: Final = Measure(
    "label_accuracy",
    "Label accuracy",
    "label accuracy",
    "Share of answers that are the right label, of groups whose responses are labels; case and punctuation aside",
)

CORPUS: Final[tuple[Measure, ...]] = (
    Measure("bleu", "BLEU", "BLEU", f"Shared 1- to 4-grams {_CORPUS}, by sacrebleu"),
    Measure("nist", "NIST", "NIST", f"Shared n-grams by information {_CORPUS}, by nltk", highest=inf, percent=False),
    Measure("ter", "TER", "TER", f"Edits by reference length {_CORPUS}, by sacrebleu, the less the better", highest=inf,
            least_is_best=True),
    Measure("cider", "CIDEr", "CIDEr", f"CIDEr-D {_CORPUS}, by pycocoevalcap; the four are not on the scale of "
            "e2e-metrics", highest=10.0, percent=False),
)  # fmt: skip
"""Measures of data-to-text answers, beside those."""

F1: Final = Measure(
    "f1",
    "F1",
    "F1",
    "Words that answer and reference share, precision and recall in one; articles and punctuation aside",
    own_groups=False,
)

SPANS: Final[tuple[Measure, ...]] = (
    Measure(
        "exact_match",
        "Exact match",
        "exact match",
        "Share of answers that are a reference; articles, punctuation and case aside",
        own_groups=False,
    ),
    F1,
)
"""Measures of spans."""

NO_ANSWER: Final = "no_answer"
"""Both measures of spans for answering nothing to any question."""

BESIDE: Final[Mapping[str, tuple[Measure, ...]]] = {
    MCC.name: (MCC, POOLED_MCC, ACCURACY),
    ACCURACY.name: (),
    ROUGE_L.name: (*GENERATION, LABEL_ACCURACY, *CORPUS),
    F1.name: SPANS,
}
"""What a run is compared by, as its task names it, to all measures that are shown beside each other. Of a run that has
several of these scores the first counts."""

SHARES: Final[Mapping[str, Measure]] = {m.name: m for m in (ACCURACY, MCC, F1, *GENERATION, LABEL_ACCURACY, *CORPUS)}
"""Metrics of personalised clients that must lie between their lowest value and their highest."""

SCORES: Final[tuple[str, ...]] = (*SHARES, LOSS)
"""All metrics of personalised clients on their test examples."""


def out_of_range(scored: pd.DataFrame) -> pd.Series[bool]:
    """Which metric rows have a value that their measure cannot have; NaN is none that it can."""
    lowest, highest = (
        scored["metric"].map({name: getattr(measure, end) for name, measure in SHARES.items()}).astype(float)
        for end in ("lowest", "highest")
    )
    return lowest.notna() & ~scored["value"].between(lowest, highest)


def pooled_matthews(cells: pd.DataFrame, group: list[str]) -> pd.DataFrame:
    """`POOLED_MCC` as ``value``, ``n_clients`` and ``n_examples``, a row per group.

    Args:
        cells: rows of `CONFUSION`, whatever they are called now.
        group: columns that rows of one group have in common.
    """
    rows = []
    for place, some in cells.groupby(group):
        counts = some.assign(label=some["module"].str.split("/").str[0]).groupby(["label", "module"])["value"].sum()
        size = counts.index.get_level_values("label").nunique()
        rows.append({
            **dict(zip(group, place, strict=True)), "n_clients": some["client"].nunique(),
            "n_examples": counts.sum(), "value": matthews(counts.to_numpy(np.int64).reshape(size, size)),
        })  # fmt: skip
    return pd.DataFrame(rows)


def no_answer_sentence(frame: pd.DataFrame, pool: str) -> str:
    """What answering nothing at all scores in a pool, for captions; empty where every question has an answer.

    Args:
        frame: checked metric rows.
        pool: which one.
    """
    here = frame[(frame["metric"] == NO_ANSWER) & (frame["stage"] == "personalise") & (frame["pool"] == pool)]
    if here.empty:
        return ""
    share = (here["value"] * here["weight"]).sum() / here["weight"].sum()
    return f"Answering no question at all scores {100 * share:.2f} in both exact match and F1."
