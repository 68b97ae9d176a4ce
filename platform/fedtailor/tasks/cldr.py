"""Task ``cldr``: which kind of thing does a name from Unicode CLDR name? Real text without a download: the default.

Texts are display names, read through Babel's public API; classes are the kinds below. Low-resource locales translate
fewer names and fewer kinds: quantity and label skew are natural.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
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

NAME_KINDS: tuple[str, ...] = ("territory", "language", "script", "currency", "unit", "calendar")
"""Kinds of names that instructions ask for (`cldr_instruct`)."""

_NOUNS = {"territory": "", "calendar": "", **{kind: f"the {kind} " for kind in ("language", "script", "currency")}}
_LONGEST = 40
"""Characters of a name; longer ones are descriptions."""

_NOTHING = frozenset(
    {"Zzzz", "Zyyy", "Zinh", "Zxxx", "Zsym", "Zmth", "Zsye", "ZZ", "XA", "XB", "und", "mul", "mis", "zxx", "XXX", "XTS"}
)
"""Codes that stand for no script, territory, language or currency in particular."""

_UNSEEN_MARKS = {0x200E: None, 0x200F: None, 0x061C: None}
"""Marks that tell a screen the direction of writing."""

CALENDAR = {"month": "months", "weekday": "days"}
"""What instructions call a thing of the calendar -> what Babel calls all of its kind."""

Names = Iterator[tuple[str, str, str]]
"""(kind, CLDR key, display name)."""

Table = dict[str, dict[str, tuple[str, str]]]
"""kind -> CLDR key -> (what an instruction calls it, its name in the language)."""


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
    inherited = {normalise(text) for _, _, text in _texts(Locale("root"))}
    english = {normalise(text) for _, _, text in _texts(Locale("en"))}
    notes: Counter[str] = Counter({"dropped_inherited": 0, "dropped_english": 0, "dropped_two_labels": 0})
    key = seed_for(seed, "cldr", "places").to_bytes(8, "little")
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for language, locale in locales_of(cfg.languages).items():
        table = _usable(locale, inherited, set() if is_english(locale) else english, notes)
        places: dict[tuple[Pool, bool], list[Example]] = {(p, t): [] for p in POOLS for t in (False, True)}
        for normal in sorted(table):
            text, kind = table[normal]
            digest = hashlib.blake2b(normal.encode(), key=key, digest_size=16).digest()
            test = int.from_bytes(digest[8:], "little") < cfg.test_fraction * 2**64
            places[POOLS[digest[0] & 1], test].append(Example(text, KINDS.index(kind)))
        for pool in POOLS:
            pools[pool][language] = LanguagePool(train=places[pool, False], test=places[pool, True])
    return Source(labels=KINDS, pools=pools, notes=dict(notes), disjoint=True)


def _usable(locale: Locale, inherited: set[str], english: set[str], notes: Counter[str]) -> dict[str, tuple[str, str]]:
    """Normalised string -> (text, kind); what is dropped is counted."""
    kept: dict[str, tuple[str, str]] = {}
    ambiguous: set[str] = set()
    for kind, key, raw in _texts(locale):
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


def _texts(locale: Locale) -> Names:
    def those(kind: str, key: str, names: Mapping[Any, Any] | None) -> Names:
        yield from ((kind, key, text) for text in (names or {}).values() if isinstance(text, str))

    yield from _names(locale)
    for zones in (locale.time_zones, locale.meta_zones):
        for key, zone in zones.items():
            yield from those("time zone", key, zone.get("long"))
    for context in ("format", "stand-alone"):
        for part in (locale.months, locale.days):
            for width in ("wide", "abbreviated"):
                yield from those("date", "", part.get(context, {}).get(width))
        yield from those("date", "", locale.quarters.get(context, {}).get("wide"))
    yield from those("date", "", locale.eras.get("wide"))


# ---- what a locale has ---------------------------------------------------------------------------------------------


def locales_of(languages: Sequence[str]) -> dict[str, Locale]:
    """Language to its `locale_for`; two languages of one locale are a `DataError`."""
    locales = {language: locale_for(language) for language in languages}
    first: dict[str, str] = {}
    for language, locale in locales.items():
        if (other := first.setdefault(str(locale), language)) != language:
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


def is_english(locale: Locale) -> bool:
    """English names stay, and are asked for by codes: they are in the instructions of all others."""
    return bool(locale.language == "en")


def _names(locale: Locale) -> Names:
    """Territories, languages, scripts, currencies and units."""
    # LocaleDataDict is a MutableMapping that resolves aliases on access: read it through items() and
    # [] only; isinstance(x, dict) is False for every nested level.
    for kind, attribute in _MAPPED:
        for key, text in getattr(locale, attribute).items():
            yield kind, key, text
    for key, widths in locale.unit_display_names.items():
        if "long" in widths:
            yield "unit", key, widths["long"]


def plain(text: str) -> str:
    """CLDR's text with ordinary spaces and without invisible marks of direction.

    >>> plain("1\\u202f250,50\\u00a0€")
    '1 250,50 €'
    """
    return " ".join(text.translate(_UNSEEN_MARKS).split())


@cache
def calendar_name(what: str, locale: Locale, number: int, width: str) -> str | None:
    """One of ``months``, 1 ... 12, or of ``days``, 0 (Monday) ... 6, by itself.

    Args:
        what: which of the two.
        locale: of CLDR.
        number: of the month or weekday.
        width: ``wide`` or ``abbreviated``; the wide one is given where the other is not to be had.
    """
    # Babel resolves some of CLDR's aliases to root's place holders ("M03", "Mon"): look where the locale has its own.
    root = getattr(Locale("root"), what)
    for context, its_width in ((c, w) for w in (width, "wide") for c in ("stand-alone", "format")):
        text = getattr(locale, what)[context][its_width].get(number)
        if text and (is_english(locale) or text != root[context][its_width].get(number)):
            return plain(text)
    return None


def names_of(locale: Locale) -> tuple[Table, Counter[str]]:
    """The names that a locale has of its own, and counts of those left out: inherited, equal to English, too long."""
    dropped: Counter[str] = Counter({"dropped_inherited": 0, "dropped_english": 0, "dropped_long": 0})
    asked = _codes() if is_english(locale) else _things()
    inherited = {(kind, key): text for kind, key, text in _askable(Locale("root"))}
    english = {(kind, key): normalise(text) for kind, key, text in _askable(Locale("en"))}
    table: Table = {kind: {} for kind in NAME_KINDS}
    for kind, key, text in _askable(locale):
        if (kind, key) not in asked:
            continue
        normal = normalise(text)
        if not normal or normal in (normalise(inherited.get((kind, key), "")), normalise(key)):
            dropped["dropped_inherited"] += 1
        elif normal in (normalise(asked[kind, key]), english.get((kind, key))) and not is_english(locale):
            dropped["dropped_english"] += 1
        elif len(text) > _LONGEST:
            dropped["dropped_long"] += 1
        else:
            table[kind][key] = (asked[kind, key], text)
    return table, dropped


def _askable(locale: Locale) -> Names:
    """The names that instructions ask for, months and weekdays by number included."""
    yield from ((kind, key, plain(text)) for kind, key, text in _names(locale))
    for what, number in (*(("month", n) for n in range(1, 13)), *(("weekday", n) for n in range(7))):
        if text := calendar_name(CALENDAR[what], locale, number, "wide"):
            yield "calendar", f"{what} {number}", text


@cache
def _things() -> dict[tuple[str, str], str]:
    """(kind, key) -> ``Kenya``, ``the language Swahili``, ``the unit kilometers``: one thing each, no descriptions."""
    simple = [
        (kind, key, text)
        for kind, key, text in _askable(Locale("en"))
        if key not in _NOTHING
        and "(" not in text
        and "_" not in key
        and not any(c.isdigit() for c in text)
        and len(text) <= _LONGEST
    ]
    count = Counter((kind, normalise(text)) for kind, _, text in simple)
    return {
        (kind, key): f"{_NOUNS.get(kind, 'the unit ')}{text}"
        for kind, key, text in simple
        if count[kind, normalise(text)] == 1
    }


@cache
def _codes() -> dict[tuple[str, str], str]:
    """(kind, key) -> ``the territory "KE"``, ``the unit "km"``, ``"Mar"``: what English names are asked for by."""
    english, codes = Locale("en"), {}
    for kind, key in _things():
        if kind == "unit":
            widths = english.unit_display_names[key]
            code = plain(widths.get("short", ""))
            if not code or normalise(code) == normalise(widths["long"]):
                continue
        elif kind == "calendar":
            what, number = key.split()
            code = str(calendar_name(CALENDAR[what], english, int(number), "abbreviated"))
        else:
            code = key
        noun = "" if kind == "calendar" else f"the {kind} "
        codes[kind, key] = f'{noun}"{code}"'
    count = Counter(codes.values())
    return {place: code for place, code in codes.items() if count[code] == 1}


ENTRY = TaskEntry(load, "classification", embedded=True)
