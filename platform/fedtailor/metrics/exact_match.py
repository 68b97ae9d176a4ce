"""Exact match: the answer is the reference, but for compatibility characters (NFKC) and white space."""

from __future__ import annotations

import unicodedata


def exact_match(prediction: str, reference: str) -> float:
    """1.0 or 0.0.

    >>> exact_match(" five  cats ", "ﬁve cats"), exact_match("Five cats", "five cats")
    (1.0, 0.0)
    """
    return float(_plain(prediction) == _plain(reference))


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())
