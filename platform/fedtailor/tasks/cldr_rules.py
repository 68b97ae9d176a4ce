"""Dates, times, quantities, money, relative times and lists: text that follows a locale's rules.

Written by Babel after Unicode CLDR, in one of CLDR's own styles, which the instruction does not mention. What a locale
does not have (Babel then falls back to root's signs, a unit's code, or English) is no answer: `Rule.write` gives None.
Numbers are in Latin digits and dates in the Gregorian calendar, as Babel writes them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date, time, timedelta
from decimal import Decimal
from functools import cache
from itertools import permutations
from typing import Any, Final

from babel import Locale, localedata
from babel.dates import format_date, format_time, format_timedelta
from babel.lists import format_list
from babel.numbers import format_currency, get_currency_precision
from babel.units import format_unit

from fedtailor.tasks.cldr import CALENDAR, calendar_name, is_english, plain
from fedtailor.tasks.source import normalise

STYLES: Final = ("short", "medium", "long", "full")
"""House styles of clients, CLDR's names of date formats; other kinds have what is nearest."""

UNITS: Final = (
    "length-kilometer", "length-meter", "length-centimeter", "mass-kilogram", "mass-gram", "mass-tonne",
    "volume-liter", "volume-milliliter", "area-hectare", "duration-second", "duration-minute", "duration-hour",
    "duration-day", "duration-week", "duration-month", "duration-year", "temperature-celsius", "angle-degree",
    "speed-kilometer-per-hour", "power-watt", "electric-volt", "digital-megabyte", "digital-gigabyte",
)  # fmt: skip

NUMBERS: Final = (*range(1, 31), 36, 45, 50, 64, 75, 90, 100, 120)

CURRENCIES: Final = (
    "USD", "EUR", "GBP", "KES", "NGN", "ETB", "ZAR", "GHS", "UGX", "TZS", "XOF", "CNY", "INR", "JPY", "BRL", "RUB",
    "EGP", "SAR", "CHF", "MXN",
)  # fmt: skip

AMOUNTS: Final = (*NUMBERS, 250, 400, 500, 750, 999)
CENTS: Final = ("2.50", "4.75", "9.99", "12.50", "19.95", "45.20", "99.50", "150.25")

SPANS: Final = {
    "year": (range(1, 21), 365 * 24 * 3600),
    "month": (range(1, 12), 30 * 24 * 3600),
    "week": (range(1, 11), 7 * 24 * 3600),
    "day": (range(1, 31), 24 * 3600),
    "hour": (range(1, 25), 3600),
    "minute": (range(1, 60), 60),
    "second": (range(1, 60), 1),
}
"""Unit of a relative time -> numbers of it, and its seconds."""

_LENGTHS = {
    "short": ("narrow", "short", "long"), "medium": ("short", "long"), "long": ("long", "short"),
    "full": ("long", "short"),
}  # fmt: skip

_JOINS = {"short": ("-narrow", "-short"), "medium": ("-short",), "long": (), "full": ()}
_LIST_PARTS = {"start", "middle", "end", "2"}
_ROOT_MONTH = re.compile(r"M(0\d|1[0-2])")
_ENGLISH_PERIOD = re.compile(r"\b[ap]\.?m\b|\d [ap]$", re.IGNORECASE)


@dataclass(frozen=True)
class Rule:
    """One kind of thing that can be written by rule.

    Args:
        kind: its name.
        subjects: all things of this kind; ``str`` of one is its name.
        part: what decides whether a locale can write a subject, e.g. its unit.
        ask: the subject in an instruction; without English words where English is asked for.
        write: the subject in a locale and style; None where the locale lacks it.
    """

    kind: str
    subjects: tuple[Any, ...]
    part: Callable[[Any], Any]
    ask: Callable[[Any, bool], str]
    write: Callable[[Any, Locale, str], str | None]


@cache
def rules() -> Mapping[str, Rule]:
    """Kind -> rule."""
    made = (
        Rule("date", tuple(_days()), lambda _: "", _ask_date, _write_date),
        Rule("time", tuple(_times()), lambda _: "", _ask_time, _write_time),
        Rule("quantity", tuple((n, u) for u in UNITS for n in NUMBERS), lambda s: s[1], _ask_quantity, _write_quantity),
        Rule("money", tuple(_sums()), lambda s: s[1], _ask_money, _write_money),
        Rule("relative time", tuple(_spans()), lambda s: (s[0] < 0, s[1]), _ask_span, _write_span),
        Rule("list", tuple(_lists()), lambda s: s[:2], _ask_list, _write_list),
    )
    return {rule.kind: rule for rule in made}


# ---- dates and times ---------------------------------------------------------------------------------------


def _days() -> Iterator[date]:
    yield from (date(2020, 1, 1) + timedelta(days=n) for n in range(3653))


def _ask_date(day: date, english: bool) -> str:
    return (
        f"{day}, a {calendar_name('days', Locale('en'), day.weekday(), 'wide')}"
        if english
        else plain(format_date(day, "full", locale="en"))
    )


def _write_date(day: date, locale: Locale, style: str) -> str | None:
    pattern = locale.date_formats[style].pattern
    if "E" in pattern and not is_english(locale):
        wide = [source.days["format"]["wide"][day.weekday()] for source in (locale, Locale("root"))]
        if wide[0] == wide[1]:
            return None
    # Babel does not follow CLDR's aliases between widths and contexts of months: try those that it has.
    for other in ("MMM", "LLL", "MMMM", "LLLL"):
        text = plain(format_date(day, re.sub(r"(?<!M)MMM(?!M)", other, pattern), locale=locale))
        if not _ROOT_MONTH.search(text):
            return text
    text = plain(format_date(day, pattern.replace("MMMM", "LLLL"), locale=locale))
    return None if _ROOT_MONTH.search(text) else text


def _times() -> Iterator[time]:
    yield from (time(h, m, s) for h in range(24) for m in range(10, 60, 5) for s in (15, 30, 45))


def _ask_time(at: time, english: bool) -> str:
    return f"{at}" if english else plain(format_time(at, "medium", locale="en"))


def _write_time(at: time, locale: Locale, style: str) -> str | None:
    pattern = locale.time_formats["short" if style == "short" else "medium"].pattern
    wide = re.sub(r"'[^']*'|a+", lambda found: "aaaa" if found[0].startswith("a") else found[0], pattern)
    for candidate in (pattern, wide):
        text = plain(format_time(at, candidate, locale=locale))
        if is_english(locale) or not _ENGLISH_PERIOD.search(text):
            return text
    return None


# ---- quantities and money ----------------------------------------------------------------------------------


@cache
def _unit_patterns(locale: str) -> Any:
    return localedata.load(locale)["unit_patterns"]


def _ask_quantity(subject: tuple[int, str], english: bool) -> str:
    number, unit = subject
    if english:
        return plain(str(_unit_patterns("root")[unit]["short"]["other"]).format(number))
    return plain(format_unit(number, unit, "long", locale="en"))


def _write_quantity(subject: tuple[int, str], locale: Locale, style: str) -> str | None:
    number, unit = subject
    patterns, form = _unit_patterns(str(locale)).get(unit, {}), locale.plural_form(number)
    # Root has short signs only, so a long form, or another sign, is the language's own.
    signs = _unit_patterns("root").get(unit, {}).get("short", {}).get("other")
    if form not in patterns.get("long", {}) and patterns.get("short", {}).get(form) in (None, signs):
        return None
    length = next(length for length in _LENGTHS[style] if form in patterns.get(length, {}))
    return plain(format_unit(number, unit, length, locale=locale))  # type: ignore[arg-type]


def _sums() -> Iterator[tuple[str, str]]:
    for currency in CURRENCIES:
        yield from ((str(amount), currency) for amount in AMOUNTS)
        if get_currency_precision(currency):
            yield from ((amount, currency) for amount in CENTS)


def _ask_money(subject: tuple[str, str], english: bool) -> str:
    amount, currency = subject
    if english:
        return f"{currency} {amount}"
    return plain(format_currency(Decimal(amount), currency, locale="en", format_type="name"))


def _write_money(subject: tuple[str, str], locale: Locale, style: str) -> str | None:
    amount, currency = subject
    name = locale.currencies.get(currency, currency)
    if not is_english(locale) and normalise(name) in (currency.casefold(), normalise(_english_currency(currency))):
        return None
    kind = "standard" if style in ("short", "medium") else "name"
    return plain(format_currency(Decimal(amount), currency, locale=locale, format_type=kind))  # type: ignore[arg-type]


def _english_currency(currency: str) -> str:
    return str(Locale("en").currencies[currency])


# ---- relative times and lists ------------------------------------------------------------------------------


def _spans() -> Iterator[tuple[int, str]]:
    for unit, (numbers, _) in SPANS.items():
        yield from ((sign * number, unit) for number in numbers for sign in (-1, 1))


def _ask_span(subject: tuple[int, str], english: bool) -> str:
    number, unit = subject
    if english:
        return f"{abs(number)} {unit}{'s' * (abs(number) > 1)} {'before' if number < 0 else 'after'} now"
    return f'"{_span(subject, Locale("en"), "long")}"'


def _write_span(subject: tuple[int, str], locale: Locale, style: str) -> str | None:
    number, unit = subject
    for length in _LENGTHS[style]:
        text = _span(subject, locale, length)
        # Without a direction of its own, it is a duration; CLDR's root has signs only ("-3 d").
        others = {_span((-number, unit), locale, length), _span(subject, Locale("root"), length)}
        others.add(_span(subject, locale, length, directed=False))
        if text and text not in others:
            return text
    return None


def _span(subject: tuple[int, str], locale: Locale, length: str, directed: bool = True) -> str | None:
    number, unit = subject
    try:
        text = format_timedelta(
            timedelta(seconds=number * SPANS[unit][1]),
            granularity=unit,  # type: ignore[arg-type]
            threshold=1e9,
            add_direction=directed,
            format=length,  # type: ignore[arg-type]
            locale=locale,
        )
    except KeyError:  # of this length the locale has one direction only
        return None
    return plain(text)


def _lists() -> Iterator[tuple[str, str, tuple[int, ...]]]:
    for join in ("standard", "or"):
        for length in (2, 3):
            yield from ((join, "weekday", items) for items in permutations(range(7), length))
        yield from ((join, "month", items) for items in permutations(range(1, 13), 2))


def _ask_list(subject: tuple[str, str, tuple[int, ...]], english: bool) -> str:
    join, what, items = subject
    if english:
        found = ", ".join(_items(what, items, Locale("en"), "abbreviated"))
        return f"the {'list' if join == 'standard' else 'choice'} {found}"
    text = format_list(_items(what, items, Locale("en"), "wide"), join, locale="en")  # type: ignore[arg-type]
    return f'"{plain(text)}"'


def _write_list(subject: tuple[str, str, tuple[int, ...]], locale: Locale, style: str) -> str | None:
    join, what, items = subject
    width = "abbreviated" if style in ("short", "medium") else "wide"
    texts = _items(what, items, locale, width)
    if len(texts) < len(items) or not _joins(locale, join):
        return None
    # Of some styles a locale has a part only, and Babel does not inherit the rest.
    its_style = next(s for s in (*_JOINS[style], "") if set(locale.list_patterns.get(join + s, ())) >= _LIST_PARTS)
    return plain(format_list(texts, join + its_style, locale=locale))  # type: ignore[arg-type]


def _items(what: str, items: tuple[int, ...], locale: Locale, width: str) -> list[str]:
    found = (calendar_name(CALENDAR[what], locale, number, width) for number in items)
    return [text for text in found if text]


@cache
def _joins(locale: Locale, join: str) -> bool:
    """The locale has a word or sign of its own before a list's last item."""
    three = [format_list(["A", "B", "C"], join, locale=its) for its in (locale, Locale("root"))]  # type: ignore[arg-type]
    return is_english(locale) or three[0] != three[1]
