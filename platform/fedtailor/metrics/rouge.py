"""ROUGE-1, ROUGE-2 and ROUGE-L of an answer (Lin, 2004): F-measures by `rouge-score`, without a stemmer.

A text without words scores 0 whatever the other is (an empty answer, a reference of an emoji alone), and so does
ROUGE-2 where a text has a single word.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from rouge_score.rouge_scorer import RougeScorer

from fedtailor.metrics.words import Tokenizer, Words, words_of

NAMES: Final = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True)
class _Cut:
    """What `rouge-score` asks of a tokenizer."""

    words: Words

    def tokenize(self, text: str) -> list[str]:
        return self.words(text)


@lru_cache(maxsize=2)
def _scorer(tokenizer: Tokenizer) -> RougeScorer:
    return RougeScorer(list(NAMES), use_stemmer=False, tokenizer=_Cut(words_of(tokenizer)))


def rouge(prediction: str, reference: str, tokenizer: Tokenizer = "unicode") -> dict[str, float]:
    """F-measures in [0, 1].

    >>> {name: round(value, 3) for name, value in rouge("the cat sat", "the cat sat down").items()}
    {'rouge1': 0.857, 'rouge2': 0.8, 'rougeL': 0.857}
    """
    scores = _scorer(tokenizer).score(reference, prediction)
    return {name: float(scores[name].fmeasure) for name in NAMES}
