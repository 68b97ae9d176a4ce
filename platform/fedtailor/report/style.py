"""One look for all figures.

How figures look: one colour-blind-safe colour and marker per method, one font, byte-stable files.

Labels of languages and classes as a figure can show them: no letter without a font.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import seaborn as sns
from matplotlib.figure import Figure

from fedtailor.methods import METHODS
from fedtailor.report.fonts import drawable, families
from fedtailor.report.names import in_method_order, language_name, method_name, shortened

INK, MUTED, GRID = "#1f2328", "#6a717c", "#dfe2e8"

SEQUENTIAL = "viridis"

_SPARE_MARKERS = ("P", "X", "<", ">", "p", "h", "*", "d")

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
    spare = iter(list(zip(sns.color_palette("colorblind").as_hex()[4:] * 2, _SPARE_MARKERS * 2, strict=False)))
    found = {}
    for method in in_method_order(methods):
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


def styled(texts: Iterable[str] = ()) -> Any:
    """Context in which figures are drawn and saved; leaves the caller's matplotlib settings alone.

    Args:
        texts: labels in any script that figures may show; fonts are chosen for them.
    """
    defaults: dict[Any, Any] = dict(mpl.rcParamsDefault)
    fonts = {"font.family": families(texts)}
    return mpl.rc_context(defaults | _RC | fonts | {"backend": mpl.rcParams["backend"]})


_WHOLE: dict[str, Any] = {"bbox_inches": "tight", "pad_inches": 0.06}
"""Long labels beside square cells reach over the figure's edge otherwise."""


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


_LONGEST = 28


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
