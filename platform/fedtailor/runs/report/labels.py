"""Labels of languages and classes as a figure can show them: no letter without a font."""

from __future__ import annotations

from fedtailor.runs.report.fonts import can_draw, drawable
from fedtailor.runs.report.names import language_name, own_name, shortened

_LONGEST = 28


def language_label(code: str) -> str:
    """ISO code and the language's own name; its English name where no installed font has the script.

    >>> language_label("deu"), language_label("q??")
    ('deu · Deutsch', 'q??')
    """
    own = own_name(code)
    name = own if own is not None and can_draw(own) else language_name(code)
    label = code if name == code else f"{code} · {name}"
    return shortened(drawable(label), _LONGEST)


def class_label(label: str, index: int) -> str:
    """A class as the task names it; its number where no installed font has the script."""
    return shortened(drawable(label, f"class {index}"), _LONGEST)
