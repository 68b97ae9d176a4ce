"""ROUGE, METEOR and exact match of an answer; sums of them by group that can be joined.

Words (ours, ``unicode``): NFKC, case-folded, invisible formatting characters left out; a word is a run of letters and
digits of any script, with the marks that belong to them (vowel signs of Telugu or Devanagari, Arabic diacritics).
Scripts that are written without spaces (Han, kana, Bopomofo; Thai, Lao, Khmer, Myanmar and the others of Unicode's
line-breaking class SA) give one word per letter with its marks. Everything else parts words. Of ASCII text these are
exactly the words of `ascii_words`: the default of `rouge-score`, as FedP2EFT's reference code runs it, which drops
every letter outside a-z, so that Arabic, Russian, Telugu or Chinese answers score about 0.

ROUGE-1, ROUGE-2 and ROUGE-L (Lin, 2004): F-measures by `rouge-score`, without a stemmer. A text without words scores 0
whatever the other is (an empty answer, a reference of an emoji alone), and so does ROUGE-2 where a text has one word.

METEOR (Banerjee & Lavie, 2005; weights of Lavie & Agarwal, 2007) by nltk, on unicode words:

    P, R -> matched words over those of the answer, of the reference
    F    -> P R / (alpha P + (1 - alpha) R)             alpha = .9
    score = F (1 - gamma (chunks / matches)^beta)       beta = 3, gamma = .5

Words match as they are or by their Porter stem, which changes words in Latin letters only. nltk's third step, synonyms
of WordNet (English), is left out on purpose, also where WordNet's data is installed: the score must not depend on what
a machine has. Scores of English texts are therefore slightly lower than those of FedP2EFT's reference code, which
downloads WordNet. A perfect answer of n words scores 1 - .5 / n^3.

Exact match: the answer is the reference, but for compatibility characters (NFKC) and white space. Of labels (``yes``),
their words alone count, whatever their case and punctuation.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal

import regex
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize as _tokenize_ascii

Words = Callable[[str], list[str]]
Tokenizer = Literal["unicode", "ascii"]

_UNSPACED: Final = (
    r"[[\p{L}\p{Nl}]&&[\p{Script_Extensions=Han}\p{Script_Extensions=Hiragana}\p{Script_Extensions=Katakana}"
    r"\p{Script_Extensions=Bopomofo}\p{Line_Break=Complex_Context}]]"
)

_INVISIBLE: Final = regex.compile(r"\p{Cf}+", regex.V1)
_WORD: Final = regex.compile(rf"{_UNSPACED}\p{{M}}*|(?:[[\p{{L}}\p{{N}}]--{_UNSPACED}]\p{{M}}*)+", regex.V1)


NAMES: Final = ("rouge1", "rouge2", "rougeL")
_STEMMER: Final = PorterStemmer()


def unicode_words(text: str) -> list[str]:
    """Words of a text in any script.

    >>> unicode_words("Don't panic: ﬁve CAFÉS!")
    ['don', 't', 'panic', 'five', 'cafés']
    >>> unicode_words("東京は2つ")
    ['東', '京', 'は', '2', 'つ']
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    found: list[str] = _WORD.findall(_INVISIBLE.sub("", folded))
    return found


def ascii_words(text: str) -> list[str]:
    """Runs of a-z and 0-9 of the lower-cased text, by `rouge-score`, without stemming.

    >>> ascii_words("Don't panic: CAFÉS!")
    ['don', 't', 'panic', 'caf', 's']
    """
    found: list[str] = _tokenize_ascii(text, None)
    return found


def words_of(tokenizer: Tokenizer) -> Words:
    """The function of a setting."""
    return unicode_words if tokenizer == "unicode" else ascii_words


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


class _NoSynonyms:
    """Stands where nltk expects WordNet; a word is then only its own synonym."""

    def synsets(self, word: str) -> tuple[Any, ...]:
        return ()


_WORDNET: Final = _NoSynonyms()


def meteor(prediction: str, reference: str) -> float:
    """Score in [0, 1]; 0 if no word matches.

    >>> round(meteor("the cats sat", "the cat sat down"), 4)
    0.755
    """
    return float(
        single_meteor_score(
            unicode_words(reference), unicode_words(prediction), preprocess=str, stemmer=_STEMMER, wordnet=_WORDNET,
            alpha=0.9, beta=3.0, gamma=0.5,
        )
    )  # fmt: skip


def exact_match(prediction: str, reference: str) -> float:
    """1.0 or 0.0.

    >>> exact_match(" five  cats ", "ﬁve cats"), exact_match("Five cats", "five cats")
    (1.0, 0.0)
    """
    return float(_plain(prediction) == _plain(reference))


def label_match(prediction: str, reference: str) -> float:
    """1.0 where an answer is the right label, else 0.0.

    >>> label_match(" Yes.", "yes"), label_match("yes, it is", "yes")
    (1.0, 0.0)
    """
    return float(unicode_words(prediction) == unicode_words(reference))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


@dataclass(frozen=True)
class Mean:
    """A mean under way.

    Args:
        total: sum of the values.
        count: how many.
    """

    total: float = 0.0
    count: int = 0

    @property
    def value(self) -> float:
        """The mean; undefined of nothing."""
        return self.total / self.count


Tally = Mapping[str, Mapping[str, Mean]]
"""Group -> metric -> mean under way."""


def init() -> Tally:
    """Nothing counted yet."""
    return {}


def add(tally: Tally, group: str, values: Mapping[str, float]) -> Tally:
    """The tally with one sample more."""
    return merge(tally, {group: {metric: Mean(value, 1) for metric, value in values.items()}})


def merge(left: Tally, right: Tally) -> Tally:
    """Two tallies joined, left first; groups and metrics in the order in which they were first seen."""
    joined = {group: dict(metrics) for group, metrics in left.items()}
    for group, metrics in right.items():
        own = joined.setdefault(group, {})
        for metric, more in metrics.items():
            before = own.get(metric, Mean())
            own[metric] = Mean(before.total + more.total, before.count + more.count)
    return joined


def result(tally: Tally) -> dict[str, dict[str, float]]:
    """Group -> metric -> mean.

    >>> result(add(add(init(), "en", {"rougeL": 0.5}), "en", {"rougeL": 1.0}))
    {'en': {'rougeL': 0.75}}
    """
    return {group: {metric: mean.value for metric, mean in metrics.items()} for group, metrics in tally.items()}
