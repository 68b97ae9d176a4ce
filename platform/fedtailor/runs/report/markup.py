"""Text of a run inside Markdown and LaTeX: escaped, and laid out as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LATEX: Mapping[str, str] = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{",
    "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "·": r"$\cdot$", "²": "$^2$", "λ": r"$\lambda$",
    "Δ": r"$\Delta$", "→": r"$\to$", "±": r"$\pm$", "−": "$-$", "–": "--", "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$", "\n": " ",
}  # fmt: skip
MARKDOWN: Mapping[str, str] = {c: f"\\{c}" for c in "\\`*_[]<>|#$~"} | {"\n": " ", "\r": " ", "&": "&amp;"}


def escape(word: str, rules: Mapping[str, str]) -> str:
    """``word`` with every letter that means something replaced.

    >>> escape("a_b & 5 %", LATEX)
    'a\\\\_b \\\\& 5 \\\\%'
    """
    return "".join(rules.get(letter, letter) for letter in word)


def pipes(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, columns padded so that the source reads as well; the first row is its header."""
    widths = [max(3, *(len(row[k]) for row in rows)) for k in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(rows[0]), line(rule), *(line(row) for row in rows[1:])])
