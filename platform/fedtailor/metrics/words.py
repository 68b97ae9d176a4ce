"""How a text is cut into words before it is compared with another.

Unicode (ours): NFKC, case-folded, invisible formatting characters left out; a word is a run of letters and digits of
any script, with the marks that belong to them (vowel signs of Telugu or Devanagari, Arabic diacritics). Scripts that
are written without spaces (Han, kana, Bopomofo; Thai, Lao, Khmer, Myanmar and the others of Unicode's line-breaking
class SA) give one word per letter with its marks. Everything else parts words. Of ASCII text these are exactly the
words of `ascii_words`.

ASCII: the default of `rouge-score`, as FedP2EFT's reference code runs it. It drops every letter outside a-z, so that
Arabic, Russian, Telugu or Chinese answers score about 0.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from typing import Final, Literal

import regex
from rouge_score.tokenize import tokenize as _tokenize_ascii

Words = Callable[[str], list[str]]
Tokenizer = Literal["unicode", "ascii"]

_UNSPACED: Final = (
    r"[[\p{L}\p{Nl}]&&[\p{Script_Extensions=Han}\p{Script_Extensions=Hiragana}\p{Script_Extensions=Katakana}"
    r"\p{Script_Extensions=Bopomofo}\p{Line_Break=Complex_Context}]]"
)
_INVISIBLE: Final = regex.compile(r"\p{Cf}+", regex.V1)
_WORD: Final = regex.compile(rf"{_UNSPACED}\p{{M}}*|(?:[[\p{{L}}\p{{N}}]--{_UNSPACED}]\p{{M}}*)+", regex.V1)


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
