"""How figures look: a colour-blind-safe colour and a marker per method, fonts that have the letters, stable bytes."""

from __future__ import annotations

import dataclasses
import io
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib import font_manager, ft2font
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedtailor.methods import METHODS
from fedtailor.report.names import in_method_order, language_name, method_name, shortened

MAIN = "DejaVu Sans"
"""Comes with matplotlib: Latin, Greek, Cyrillic, Arabic, Hebrew, Georgian, Armenian, Lao and symbols."""

_SUFFIXES = (".ttf", ".otf", ".ttc")

# Their glyphs are boxes, or nothing.
_PLACEHOLDERS = ("last resort", "lastresort", "adobe blank", "adobenotdef")
INK, MUTED, GRID = "#1f2328", "#6a717c", "#dfe2e8"
SEQUENTIAL = "viridis"
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
    (0, ()), (0, (5, 2)), (0, (1, 1.4)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)),
)  # fmt: skip
"""One per run, where several are in a figure."""
_SPARE_MARKERS = ("P", "X", "<", ">", "p", "h", "d")

_RC: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold",
    "axes.labelsize": 9, "axes.titlelocation": "left", "xtick.labelsize": 8.5, "ytick.labelsize": 8.5,
    "legend.fontsize": 9, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": MUTED, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID,
    "grid.linewidth": 0.7, "lines.linewidth": 1.8, "figure.facecolor": "white", "axes.facecolor": "none",
    "savefig.facecolor": "white", "svg.fonttype": "path", "axes.unicode_minus": True,
    "figure.constrained_layout.use": True,
    # Names of languages and modules are data: a dollar sign in one is no formula.
    "text.parse_math": False,
}  # fmt: skip

_WHOLE: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06}
"""Long labels beside square cells reach over the figure's edge otherwise."""

_LONGEST = 28


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


@dataclass(frozen=True)
class Drawing:
    """A figure with the file name it gets, its title, and what a reader must know."""

    name: str
    title: str
    caption: str
    figure: Figure


@dataclass(frozen=True)
class Missing:
    """A figure that the data do not allow, and why."""

    title: str
    reason: str


@dataclass(frozen=True)
class Look:
    """Colour, marker and printed name of a method."""

    colour: str
    marker: str
    label: str


def looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, in method order; the same in every figure for one whose entry names it."""
    ordered = in_method_order(methods)
    taken = {entry.colour for method in ordered if (entry := METHODS.get(method))}
    colours = [*sns.color_palette("colorblind").as_hex()[4:], *sns.color_palette("Dark2").as_hex()]
    spare = zip([colour for colour in colours if colour not in taken], cycle(_SPARE_MARKERS), strict=False)
    found = {}
    for method in ordered:
        entry = METHODS.get(method)
        colour, marker = (entry.colour, entry.marker) if entry else (None, None)
        if colour is None or marker is None:
            free = next(spare, ("#000000", "."))
            colour, marker = colour or str(free[0]), marker or free[1]
        found[method] = Look(colour, marker, drawable(method_name(method)))
    return found


def plain(value: float, position: int | None = None) -> str:
    """A tick label without mathematical notation, e.g. ``0.002`` or ``2e-05``."""
    return f"{value:g}"


def panels(
    n: int, columns: int, width: float, height: float, sharex: bool = False, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure of ``n`` panels in rows of ``columns``.

    Args:
        n: panels, at least one.
        columns: panels beside each other.
        width: of the figure in inches; ``height``: of one row of panels.
        sharex: one x axis for all; ``sharey``: one y axis.
    """
    rows = -(-n // columns)
    figure = Figure(figsize=(width, height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey).flat)
    for axis in axes[n:]:
        axis.remove()
    return figure, axes[:n]


def language_rows(axis: Axes, codes: Sequence[str]) -> None:
    """Names the rows of a panel, one per language."""
    axis.set_yticks(range(len(codes)), [language_label(code) for code in codes])
    axis.set_ylim(-0.6, len(codes) - 0.4)


def open_rows(axis: Axes) -> None:
    """Takes the lines away that would run along rows."""
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)


def log_ticks(axis: Axis, numticks: int | None = None) -> None:
    """Ticks at 1, 2 and 5 of every decade, as plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=numticks))
    axis.set_major_formatter(FuncFormatter(plain))
    axis.set_minor_formatter(NullFormatter())


def styled(texts: Iterable[str] = ()) -> Any:
    """Context in which figures are drawn and saved; leaves the caller's matplotlib settings alone.

    Args:
        texts: labels in any script that figures may show; fonts are chosen for them.
    """
    defaults: dict[Any, Any] = dict(mpl.rcParamsDefault)
    fonts = {"font.family": families(texts)}
    return mpl.rc_context(defaults | _RC | fonts | {"backend": mpl.rcParams["backend"]})


def save(drawing: Drawing, folder: Path) -> tuple[Path, Path]:
    """Writes ``<name>.png`` (150 dpi) and ``<name>.svg``; equal figures give equal bytes."""
    png, svg = folder / f"{drawing.name}.png", folder / f"{drawing.name}.svg"
    # The salt names the ids inside the SVG; without one they are random.
    with mpl.rc_context({"svg.hashsalt": drawing.name}):
        drawing.figure.savefig(png, dpi=150, metadata={"Software": None}, **_WHOLE)
        # Laid out once; the second file reuses the positions.
        drawing.figure.set_layout_engine("none")
        text = io.StringIO()
        drawing.figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, **_WHOLE)
    svg.write_text(text.getvalue(), "utf-8")
    return png, svg


def language_label(code: str) -> str:
    """ISO code and English name of a language; a group of the user's own as it is named.

    >>> language_label("deu"), language_label("q??")
    ('deu · German', 'q??')
    """
    name = language_name(code)
    label = code if name == code else f"{code} · {name}"
    return shortened(drawable(label), _LONGEST)


def class_label(label: str, index: int) -> str:
    """A class as the task names it; its number where no installed font has the script."""
    return shortened(drawable(label, f"class {index}"), _LONGEST)
