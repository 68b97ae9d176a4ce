"""Measures of data-to-text answers that are of a corpus, not of an answer: BLEU, NIST, TER, CIDEr.

PF2LoRA (Hao et al. 2025, Tables 3, 4 and 15) has them of the WebNLG and E2E challenges' scripts. Here they are those of
kept libraries, over lower-cased `words`, and so on another scale than e2e-metrics' (mteval-v13a, coco-caption with
Java's tokenizer):
    BLEU   sacrebleu: up to 4-grams, exponential smoothing, the nearest reference length
    TER    sacrebleu: edits over the mean length of the references, the cheapest reference; less is better
    NIST   nltk: Doddington 2002, up to 5-grams
    CIDEr  pycocoevalcap: CIDEr-D (Vedantam et al. 2015), document frequencies from the references that are scored
A corpus is a client's test answers of one group. CIDEr of a corpus of one input is 0, as its frequencies say nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from nltk.translate.nist_score import corpus_nist
from pycocoevalcap.cider.cider import Cider
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.ter import TER

from fedtailor.tasks.source import spaced

_NIST_ORDER: Final = 5

Corpus = Sequence[str]
References = Sequence[Sequence[str]]


def words(text: str) -> str:
    """Lower-cased words and punctuation marks with a blank between.

    >>> words("It's £20-25.")
    "it ' s £ 20 - 25 ."
    """
    return spaced(text.lower())


def corpus_measures(answers: Corpus, references: References) -> dict[str, float]:
    """All measures of a corpus, by name: BLEU and TER as shares, NIST and CIDEr as they are.

    Args:
        answers: n answers, empty ones included.
        references: of each at least one.
    """
    cut = [words(answer) for answer in answers]
    right = [[words(reference) for reference in own] for own in references]
    return {name: measure(cut, right) for name, measure in MEASURES.items()}


def bleu(answers: Corpus, references: References) -> float:
    """In [0, 1]."""
    found = BLEU(tokenize="none", force=True).corpus_score(answers, _by_place(references))
    return float(found.score) / 100


def ter(answers: Corpus, references: References) -> float:
    """0 or more; 1 of answers without words."""
    return float(TER().corpus_score(answers, _by_place(references)).score) / 100


def nist(answers: Corpus, references: References) -> float:
    """0 or more; of answers that are all shorter than an order, the sum up to what they reach."""
    longest = max((len(answer.split()) for answer in answers), default=0)
    if not longest:
        return 0.0
    order = min(_NIST_ORDER, longest)
    return float(corpus_nist([[r.split() for r in own] for own in references], [a.split() for a in answers], order))


def cider(answers: Corpus, references: References) -> float:
    """In [0, 10]."""
    right = dict(enumerate(map(list, references)))
    mean, _ = Cider().compute_score(right, {i: [answer] for i, answer in enumerate(answers)})
    return float(mean)


MEASURES: Final[dict[str, Callable[[Corpus, References], float]]] = {
    "bleu": bleu,
    "nist": nist,
    "ter": ter,
    "cider": cider,
}


def _by_place(references: References) -> list[list[Any]]:
    """Each answer's first references, its second ones, ...; None where it has fewer."""
    most = max(map(len, references))
    return [[own[place] if place < len(own) else None for own in references] for place in range(most)]
