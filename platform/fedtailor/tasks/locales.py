"""Language codes of the datasets -> Babel locale names."""

from __future__ import annotations

from difflib import get_close_matches

from babel import Locale, UnknownLocaleError
from babel.localedata import locale_identifiers

from fedtailor.core.errors import DataError

MASAKHANEWS = {
    "amh": "am", "eng": "en", "fra": "fr", "hau": "ha", "ibo": "ig", "lin": "ln", "lug": "lg", "orm": "om",
    "pcm": "pcm", "run": "rn", "sna": "sn", "som": "so", "swa": "sw", "tir": "ti", "xho": "xh", "yor": "yo",
}  # fmt: skip
"""ISO 639-3, 16 languages."""

XNLI = {
    "ara": "ar", "bul": "bg", "deu": "de", "ell": "el", "eng": "en", "spa": "es", "fra": "fr", "hin": "hi",
    "rus": "ru", "swa": "sw", "tha": "th", "tur": "tr", "urd": "ur", "vie": "vi", "zho": "zh",
}  # fmt: skip
"""ISO 639-3, 15 languages; the dataset's own two-letter codes are Babel names already."""

FED_AYA = {
    "arb": "ar", "eng": "en", "fra": "fr", "por": "pt", "rus": "ru", "spa": "es", "tel": "te", "zho": "zh",
}  # fmt: skip
"""ISO 639-3, 8 languages."""

LOCALES = MASAKHANEWS | XNLI | FED_AYA


def locale_for(language: str) -> Locale:
    """The Babel locale of a dataset's language code or of any Babel locale name (``pt_BR``, ``zh_Hant``).

    Raises:
        DataError: CLDR has no such locale; names the nearest codes.
    """
    name = LOCALES.get(language, language).replace("-", "_")
    try:
        if name != "root":
            return Locale.parse(name)
    except (UnknownLocaleError, ValueError):
        pass
    near = get_close_matches(language, [*LOCALES, *locale_identifiers()], n=3)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise DataError(f"task.languages: {language!r} is neither a known code nor a Babel locale name{hint}")
