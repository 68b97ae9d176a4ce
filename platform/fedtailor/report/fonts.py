"""Which installed fonts draw a text, so that no figure shows boxes where letters should be."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from matplotlib import font_manager, ft2font

MAIN = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew, Georgian, Armenian, Lao and symbols."""

_SUFFIXES = (".ttf", ".otf", ".ttc")

# Their glyphs are boxes, or nothing.
_PLACEHOLDERS = ("last resort", "lastresort", "adobe blank", "adobenotdef")


def can_draw(text: str) -> bool:
    """Whether a figure shows every letter of ``text``: some font has it, and matplotlib can join its letters.

    >>> can_draw("Tiếng Việt · ελληνικά · русский"), can_draw(chr(0x10FFFD))
    (True, False)
    """
    if not _shapes() and any(_needs_shaping(letter) for letter in text):
        return False
    missing = _missing(text)
    return not missing or _font_for(missing) is not None


def drawable(text: str, instead: str | None = None) -> str:
    """``text`` where a figure can show it, else ``instead``, else ``text`` with ``?`` for letters it cannot show."""
    if can_draw(text):
        return text
    return instead if instead is not None else "".join(letter if can_draw(letter) else "?" for letter in text)


def families(texts: Iterable[str]) -> list[str]:
    """Font families for matplotlib's ``font.family``: `MAIN`, then what the texts need besides, made known to it.

    Args:
        texts: what a figure may show; what no font has is left out.
    """
    fonts = {_font_for(missing) for text in texts if (missing := _missing(text))}
    return [MAIN, *dict.fromkeys(_register(path) for path in sorted(path for path in fonts if path is not None))]


@cache
def _missing(text: str) -> frozenset[str]:
    letters = {letter for letter in text if unicodedata.category(letter) not in ("Cf", "Cc", "Zs")}
    return frozenset(letters - _letters(font_manager.findfont(MAIN)))


@cache
def _font_for(letters: frozenset[str]) -> str | None:
    # One font for all letters: marks only combine with letters of their own font.
    return next((path for path in _candidates() if letters <= _letters(path)), None)


@cache
def _candidates() -> tuple[str, ...]:
    found = {path for path in font_manager.findSystemFonts() if path.lower().endswith(_SUFFIXES)}
    return tuple(sorted(found, key=lambda path: (_preference(Path(path).name), Path(path).name, path)))


def _preference(name: str) -> int:
    if not name.startswith("Noto"):
        return 2
    return 0 if name.startswith(("NotoSans-", "NotoSans[")) or ("Sans" in name and "Regular" in name) else 1


@cache
def _letters(path: str) -> frozenset[str]:
    try:
        font = ft2font.FT2Font(path)
    except (OSError, RuntimeError):
        # Not every file that a system lists as a font is one; it draws nothing.
        return frozenset()
    slanted_or_bold = font.style_flags & (ft2font.StyleFlags.BOLD | ft2font.StyleFlags.ITALIC)
    if slanted_or_bold or not font.face_flags & ft2font.FaceFlags.SCALABLE:
        return frozenset()
    if any(word in font.family_name.lower() for word in _PLACEHOLDERS):
        return frozenset()
    return frozenset(map(chr, font.get_charmap()))


@cache
def _register(path: str) -> str:
    name = ft2font.FT2Font(path).family_name
    manager = font_manager.fontManager
    if all(entry.fname != path for entry in manager.ttflist):
        manager.addfont(path)
    regular = next(entry for entry in manager.ttflist if entry.fname == path)
    if all(entry.weight != 700 for entry in manager.ttflist if entry.name == name):
        # Titles ask every family for its bold face; the regular one serves, without a warning each time.
        manager.ttflist.append(dataclasses.replace(regular, weight=700))
    return str(name)


def _shapes() -> bool:
    # matplotlib joins and orders letters from 3.11 on.
    return hasattr(ft2font, "__libraqm_version__")


def _needs_shaping(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL") or unicodedata.category(letter) in ("Mn", "Mc")
