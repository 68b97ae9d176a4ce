"""METEOR of an answer (Banerjee & Lavie, 2005; weights of Lavie & Agarwal, 2007) by nltk.

    P, R -> matched words over those of the answer, of the reference
    F    -> P R / (alpha P + (1 - alpha) R)             alpha = .9
    score = F (1 - gamma (chunks / matches)^beta)       beta = 3, gamma = .5

Words are those of `metrics.words.unicode_words`. They match as they are or by their Porter stem, which changes words in
Latin letters only. nltk's third step, synonyms of WordNet (English), is left out on purpose, also where WordNet's data
is installed: the score must not depend on what a machine has. Scores of English texts are therefore slightly lower than
those of FedP2EFT's reference code, which downloads WordNet. A perfect answer of n words scores 1 - .5 / n^3.
"""

from __future__ import annotations

from typing import Any, Final

from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score

from fedtailor.metrics.words import unicode_words


class _NoSynonyms:
    """Stands where nltk expects WordNet; a word is then only its own synonym."""

    def synsets(self, word: str) -> tuple[Any, ...]:
        return ()


_STEMMER: Final = PorterStemmer()
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
