"""Values of a run as people write them, dotted look-ups in nested mappings, and escapes for Markdown and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOT_RECORDED = "not recorded"

ABSENT = "–"

LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "·": r"$\cdot$", "²": "$^2$", "λ": r"$\lambda$",
    "Δ": r"$\Delta$", "→": r"$\to$", "±": r"$\pm$", "−": "$-$", "–": "--", "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$", "\n": " ",
}  # fmt: skip

MARKDOWN: Mapping[str, str] = {c: f"\\{c}" for c in "\\`*_[]<>|#$~"} | {"\n": " ", "\r": " ", "&": "&amp;"}


def percent(value: float | None) -> str:
    """A fraction in percent with two decimals; `ABSENT` for None.

    >>> percent(0.84216), percent(None)
    ('84.22', '–')
    """
    return ABSENT if value is None else f"{100 * value:.2f}"


def points(value: float) -> str:
    """A signed difference of fractions in percentage points, with a true minus sign."""
    return f"{100 * value:+.2f}".replace("-", "−")


def budget_title(budget: int | None) -> str:
    """``r = 8``, or a phrase where no method has budgets."""
    return "No budget" if budget is None else f"r = {budget}"


def get_path(tree: Any, path: str) -> Any:
    """Value at a dotted path of a nested mapping, None where there is none."""
    for key in path.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def text(value: Any) -> str:
    """A value as people write it: no quotes, lists in brackets, `NOT_RECORDED` for None."""
    return NOT_RECORDED if value is None or value == "" else format_value(value)


def plural(n: int, noun: str) -> str:
    """``1 client``, ``2 clients``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and text of every leaf of a nested mapping, in order; long lists are numbered by index."""
    if isinstance(tree, Mapping) and tree:
        return [
            leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if _is_list(tree) and any(isinstance(item, Mapping) for item in tree):
        return [leaf for k, value in enumerate(tree) for leaf in leaves(value, f"{prefix}[{k}]")]
    return [(prefix, format_value(tree))]


def format_value(value: Any) -> str:
    """A value as people write it: no quotes, lists in brackets."""
    if isinstance(value, str):
        return value
    if _is_list(value):
        return f"[{', '.join(format_value(item) for item in value)}]"
    if value is None or isinstance(value, bool | Mapping):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return str(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def format_range(numbers: Iterable[int]) -> str:
    """``3``, or ``3 to 7`` where they differ.

    >>> format_range([7, 3, 5]), format_range([4, 4])
    ('3 to 7', '4')
    """
    found = sorted(numbers)
    low, high = found[0], found[-1]
    return str(low) if low == high else f"{low} to {high}"


def escape(word: str, rules: Mapping[str, str]) -> str:
    """``word`` with every letter that means something replaced.

    >>> escape("a_b & 5 %", LATEX)
    'a\\\\_b \\\\& 5 \\\\%'
    """
    return "".join(rules.get(letter, letter) for letter in word)
