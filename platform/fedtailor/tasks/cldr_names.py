"""Names of places, languages, scripts, currencies, units, months and weekdays, asked for in English.

Read from Unicode CLDR through Babel's public API. A name that a locale does not have (Babel then gives its parent's, a
code, or English) is no answer and is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache

from babel import Locale

from fedtailor.tasks.source import normalise

KINDS: tuple[str, ...] = ("territory", "language", "script", "currency", "unit", "calendar")

_MAPPED = (
    ("territory", "territories"),
    ("language", "languages"),
    ("script", "scripts"),
    ("currency", "currencies"),
)

_NOUNS = {"territory": "", "calendar": "", **{kind: f"the {kind} " for kind in ("language", "script", "currency")}}

_LONGEST = 40
"""Characters of a name; longer ones are descriptions."""

_NOTHING = frozenset(
    {"Zzzz", "Zyyy", "Zinh", "Zxxx", "Zsym", "Zmth", "Zsye", "ZZ", "XA", "XB", "und", "mul", "mis", "zxx", "XXX", "XTS"}
)
"""Codes that stand for no script, territory, language or currency in particular."""

_UNSEEN_MARKS = {0x200E: None, 0x200F: None, 0x061C: None}
"""Marks that tell a screen the direction of writing."""

Table = dict[str, dict[str, tuple[str, str]]]
"""kind -> CLDR key -> (what an instruction calls it, its name in the language)."""


def plain(text: str) -> str:
    """CLDR's text with ordinary spaces and without invisible marks of direction.

    >>> plain("1\\u202f250,50\\u00a0€")
    '1 250,50 €'
    """
    return " ".join(text.translate(_UNSEEN_MARKS).split())


def is_english(locale: Locale) -> bool:
    """English is asked for by codes, as its names are in the instructions of all others."""
    return bool(locale.language == "en")


def names(locale: Locale) -> tuple[Table, Counter[str]]:
    """The names that a locale has of its own, and counts of those left out: inherited, equal to English, too long."""
    dropped: Counter[str] = Counter({"dropped_inherited": 0, "dropped_english": 0, "dropped_long": 0})
    asked = _codes() if is_english(locale) else _things()
    inherited = {(kind, key): text for kind, key, text in _raw(Locale("root"))}
    table: Table = {kind: {} for kind in KINDS}
    for kind, key, text in _raw(locale):
        if (kind, key) not in asked:
            continue
        normal = normalise(text)
        if not normal or normal in (normalise(inherited.get((kind, key), "")), normalise(key)):
            dropped["dropped_inherited"] += 1
        elif normal in (normalise(asked[kind, key]), _english().get((kind, key))) and not is_english(locale):
            dropped["dropped_english"] += 1
        elif len(text) > _LONGEST:
            dropped["dropped_long"] += 1
        else:
            table[kind][key] = (asked[kind, key], text)
    return table, dropped


def month(locale: Locale, number: int, width: str) -> str | None:
    """Month 1 ... 12 by itself, in ``wide`` or ``abbreviated``; the wide one where the other is not to be had."""
    return _calendar("months", locale, number, width)


def weekday(locale: Locale, number: int, width: str) -> str | None:
    """Weekday 0 (Monday) ... 6 by itself, as `month`."""
    return _calendar("days", locale, number, width)


@cache
def _calendar(what: str, locale: Locale, number: int, width: str) -> str | None:
    # Babel resolves some of CLDR's aliases to root's place holders ("M03", "Mon"): look where the locale has its own.
    root = getattr(Locale("root"), what)
    for context, its_width in ((c, w) for w in (width, "wide") for c in ("stand-alone", "format")):
        text = getattr(locale, what)[context][its_width].get(number)
        if text and (is_english(locale) or text != root[context][its_width].get(number)):
            return plain(text)
    return None


def _raw(locale: Locale) -> Iterator[tuple[str, str, str]]:
    # LocaleDataDict resolves aliases on access only: read it through items() and [].
    for kind, attribute in _MAPPED:
        for key, text in getattr(locale, attribute).items():
            yield kind, key, plain(text)
    for key, widths in locale.unit_display_names.items():
        if "long" in widths:
            yield "unit", key, plain(widths["long"])
    for number in range(1, 13):
        if text := month(locale, number, "wide"):
            yield "calendar", f"month {number}", text
    for number in range(7):
        if text := weekday(locale, number, "wide"):
            yield "calendar", f"weekday {number}", text


@cache
def _english() -> dict[tuple[str, str], str]:
    return {(kind, key): normalise(text) for kind, key, text in _raw(Locale("en"))}


@cache
def _things() -> dict[tuple[str, str], str]:
    """(kind, key) -> ``Kenya``, ``the language Swahili``, ``the unit kilometers``: one thing each, no descriptions."""
    simple = [
        (kind, key, text)
        for kind, key, text in _raw(Locale("en"))
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
            code = str((month if what == "month" else weekday)(english, int(number), "abbreviated"))
        else:
            code = key
        noun = "" if kind == "calendar" else f"the {kind} "
        codes[kind, key] = f'{noun}"{code}"'
    count = Counter(codes.values())
    return {place: code for place, code in codes.items() if count[code] == 1}
