"""Task ``cldr``: which kind of thing does a name from Unicode CLDR name? Real text without a download: the default.

Texts are display names, read through Babel's public API; classes are the kinds below. Low-resource locales translate
fewer names and fewer kinds: quantity and label skew are natural.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from babel import Locale, UnknownLocaleError
from babel.localedata import locale_identifiers

from fedtailor.core.errors import DataError, did_you_mean
from fedtailor.core.seeding import seed_for
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Pool, Source, TaskEntry, normalise

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


KINDS: tuple[str, ...] = ("territory", "language", "script", "currency", "time zone", "unit", "date")
"""Class names; a label is an index into them. City names are left out: half of the languages have next to none,
and without context a city reads like a territory."""

_MAPPED = (
    ("territory", "territories"),
    ("language", "languages"),
    ("script", "scripts"),
    ("currency", "currencies"),
)

Names = Iterator[tuple[str, str, str]]
"""(kind, CLDR key, display name)."""


def locales_of(languages: Sequence[str]) -> dict[str, Locale]:
    """Language to its `locale_for`; two languages of one locale are a `DataError`."""
    locales = {language: locale_for(language) for language in languages}
    owners: dict[str, str] = {}
    for language, locale in locales.items():
        if (other := owners.setdefault(str(locale), language)) != language:
            raise DataError(f"task.languages: {other!r} and {language!r} are the same CLDR locale {locale}")
    return locales


def locale_for(language: str) -> Locale:
    """The Babel locale of a dataset's language code or of any Babel locale name (``pt_BR``, ``zh_Hant``).

    Raises:
        DataError: CLDR has no such locale; names the nearest code.
    """
    name = LOCALES.get(language, language).replace("-", "_")
    try:
        if name != "root":
            return Locale.parse(name)
    except (UnknownLocaleError, ValueError):
        pass
    hint = did_you_mean(language, [*LOCALES, *locale_identifiers()])
    raise DataError(f"task.languages: {language!r} is neither a known code nor a Babel locale name{hint}")


def load(cfg: TaskConfig, seed: int) -> Source:
    """Display names by pool, language and split.

    A normalised string has one place, drawn from (seed, string) alone: it never crosses pools or splits in
    any language, and adding a language moves no text of another one.

    Args:
        cfg: `languages` are codes of `tasks.cldr` or Babel locale names; `test_fraction` is used.
        seed: run seed.

    Raises:
        DataError: an unknown language, or two codes of one locale.
    """
    tables, notes = _tables(cfg)
    key = seed_for(seed, "cldr", "places").to_bytes(8, "little")
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for language, table in tables.items():
        places: dict[tuple[Pool, bool], list[Example]] = {(p, t): [] for p in POOLS for t in (False, True)}
        for normal in sorted(table):
            text, kind = table[normal]
            places[_place(normal, key, cfg.test_fraction)].append(Example(text, KINDS.index(kind)))
        for pool in POOLS:
            pools[pool][language] = LanguagePool(train=places[pool, False], test=places[pool, True])
    return Source(labels=KINDS, pools=pools, notes=notes, disjoint=True)


def counts(cfg: TaskConfig) -> dict[str, dict[str, int]]:
    """Usable texts per language and kind: ``{"amh": {"territory": 265, ...}, ...}``."""
    tables, _ = _tables(cfg)
    found = {language: Counter(kind for _, kind in table.values()) for language, table in tables.items()}
    return {language: {kind: counter[kind] for kind in KINDS} for language, counter in found.items()}


def _place(normal: str, key: bytes, test_fraction: float) -> tuple[Pool, bool]:
    digest = hashlib.blake2b(normal.encode(), key=key, digest_size=16).digest()
    test = int.from_bytes(digest[8:], "little") < test_fraction * 2**64
    return POOLS[digest[0] & 1], test


def _tables(cfg: TaskConfig) -> tuple[dict[str, dict[str, tuple[str, str]]], dict[str, int]]:
    """Language -> normalised string -> (text, kind), and the counts of dropped strings."""
    english = Locale("en")
    inherited = {normalise(text) for _, _, text in _names(Locale("root"))}
    english_names = {normalise(text) for _, _, text in _names(english)}
    notes: Counter[str] = Counter({"dropped_inherited": 0, "dropped_english": 0, "dropped_two_labels": 0})
    tables = {}
    for language, locale in locales_of(cfg.languages).items():
        is_english = locale.language == "en"
        tables[language] = _clean(list(_names(locale)), inherited, set() if is_english else english_names, notes)
    return tables, dict(notes)


def _clean(
    names: list[tuple[str, str, str]], inherited: set[str], english: set[str], notes: Counter[str]
) -> dict[str, tuple[str, str]]:
    kept: dict[str, tuple[str, str]] = {}
    ambiguous: set[str] = set()
    for kind, key, raw in names:
        text = " ".join(raw.split())
        normal = normalise(text)
        if not normal:
            continue
        if normal in inherited or normal == normalise(key):
            notes["dropped_inherited"] += 1
        elif normal in english:
            notes["dropped_english"] += 1
        elif kept.setdefault(normal, (text, kind))[1] != kind:
            ambiguous.add(normal)
    notes["dropped_two_labels"] += len(ambiguous)
    return {normal: value for normal, value in kept.items() if normal not in ambiguous}


def _names(locale: Locale) -> Names:
    # LocaleDataDict is a MutableMapping that resolves aliases on access: read it through items() and
    # [] only; isinstance(x, dict) is False for every nested level.
    for kind, attribute in _MAPPED:
        for key, text in getattr(locale, attribute).items():
            yield kind, key, text
    for zones in (locale.time_zones, locale.meta_zones):
        for key, zone in zones.items():
            for text in _texts(zone.get("long")):
                yield "time zone", key, text
    for key, widths in locale.unit_display_names.items():
        if "long" in widths:
            yield "unit", key, widths["long"]
    yield from _dates(locale)


def _dates(locale: Locale) -> Names:
    for part in (locale.months, locale.days):
        for context in ("format", "stand-alone"):
            for width in ("wide", "abbreviated"):
                for text in _texts(part.get(context, {}).get(width)):
                    yield "date", "", text
    for context in ("format", "stand-alone"):
        for text in _texts(locale.quarters.get(context, {}).get("wide")):
            yield "date", "", text
    for text in _texts(locale.eras.get("wide")):
        yield "date", "", text


def _texts(names: Mapping[Any, Any] | None) -> list[str]:
    return [text for text in names.values() if isinstance(text, str)] if names is not None else []


ENTRY = TaskEntry(load, "classification", embedded=True)
