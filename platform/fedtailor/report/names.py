"""What a reader sees in place of identifiers and values, and in which order; escapes for Markdown and LaTeX."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from babel import Locale
from babel.core import UnknownLocaleError, get_global

from fedtailor.methods import METHODS

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

_METRICS = {
    "train_loss": "Training loss", "psg_loss": "PSG loss (L1)", "psg_loss_after": "PSG loss after the step",
    "lambda_target_median": "Median of the λ targets", "lambda_target_min": "Minimum of the λ targets",
    "lambda_target_max": "Maximum of the λ targets", "lambda_target_sd": "SD of the λ targets",
    "inner_loss": "Training loss before the inner step",
    "mix_evaluations": "Mixes scored", "mix_tokens": "Tokens of the rows they were scored on",
    "mix_gain": "Loss of the common LoRA less of the mix", "slow_start": "Share of clients that mixed nothing",
    "cross_share": "Term with second derivatives, share of the gradient",
    "ce_gradient_share": "Gradient share of the cross-entropy",
    "epsilon": "Epsilon spent, with the stages before", "clipped_share": "Share of clients clipped",
    "update_norm": "Norm of the cohort's mean update", "noise_norm": "Norm of its noise",
    "noise_to_update": "Noise / update", "secagg_up_bytes": "Bytes up per client",
    "secagg_down_bytes": "Bytes down per client", "secagg_vanished": "Clients that vanished",
}  # fmt: skip


def method_name(method: str) -> str:
    """Name of a method as printed, e.g. ``FedP²EFT``; the identifier itself where none is known."""
    return METHODS[method].title if method in METHODS else method


def in_method_order(methods: Iterable[str]) -> tuple[str, ...]:
    """Each method once, as in the METHODS table; others follow alphabetically.

    >>> in_method_order(["zeta", "fedp2eft", "alpha", "base", "base"])
    ('base', 'fedp2eft', 'alpha', 'zeta')
    """
    rank = {name: k for k, name in enumerate(METHODS)}
    return tuple(sorted(set(methods), key=lambda name: (rank.get(name, len(rank)), name)))


def in_pool_order(pools: Iterable[str]) -> tuple[str, ...]:
    """Each pool once: seen, unseen, then others alphabetically."""
    rank = {"seen": 0, "unseen": 1}
    return tuple(sorted(set(pools), key=lambda name: (rank.get(name, 2), name)))


def in_budget_order(budgets: Iterable[int | None]) -> list[int | None]:
    """Each budget once, ascending; None first."""
    return sorted(set(budgets), key=lambda r: -1 if r is None else r)


def pool_name(pool: str) -> str:
    """``Seen clients``, ``Unseen clients``; ``All clients`` for the empty pool."""
    return f"{pool[:1].upper()}{pool[1:]} clients" if pool else "All clients"


@cache
def language_name(code: str) -> str:
    """English name of a language from Unicode CLDR; the code itself where CLDR has none.

    Args:
        code: ISO 639-1 or 639-3, optionally with script or territory.

    >>> language_name("amh"), language_name("pcm"), language_name("pt-BR"), language_name("q??")
    ('Amharic', 'Nigerian Pidgin', 'Brazilian Portuguese', 'q??')
    """
    names = Locale("en").languages
    short = short_code(code)
    name = names.get(short, names.get(code))
    if name is None and (locale := _locale(short)) is not None:
        name = locale.get_display_name("en")
    return str(name or code)


@cache
def own_name(code: str) -> str | None:
    """What its speakers call a language, from Unicode CLDR; None where CLDR does not say.

    >>> own_name("ur"), own_name("yor"), own_name("q??")
    ('اردو', 'Èdè Yorùbá', None)
    """
    locale = _locale(short_code(code))
    return None if locale is None else locale.get_display_name()


@cache
def text_direction(code: str) -> str:
    """``rtl`` or ``ltr``, for markup."""
    locale = _locale(short_code(code))
    return "ltr" if locale is None else str(locale.text_direction)


def short_code(code: str) -> str:
    """The tag under which Unicode CLDR lists a language.

    >>> short_code("amh"), short_code("pt-BR")
    ('am', 'pt_BR')
    """
    return str(get_global("language_aliases").get(code, code)).replace("-", "_")


def _locale(short: str) -> Locale | None:
    try:
        return Locale.parse(short)
    except (ValueError, UnknownLocaleError):
        return None


def shortened(word: str, limit: int) -> str:
    """At most ``limit`` characters, with an ellipsis where some were cut."""
    return word if len(word) <= limit else f"{word[: limit - 1]}…"


def metric_name(metric: str) -> str:
    """Name of a metric on an axis."""
    return _METRICS.get(metric, metric[:1].upper() + metric[1:].replace("_", " "))


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
