"""How much of the texts the model's tokenizer knows, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtailor.report.names import language_name

_FEW = 0.001
"""Share that is not worth a number of its own."""


def unknown_counts(recorded: Mapping[str, Mapping[str, Sequence[int]]] | None) -> dict[str, tuple[int, int]]:
    """Language to unknown tokens and all tokens over a run's data, the largest share first; empty: not recorded.

    Args:
        recorded: ``unknown_tokens`` of run.json: artifact of tokens to those of its languages.
    """
    total: dict[str, tuple[int, int]] = {}
    for counts in (recorded or {}).values():
        for language, (unknown, tokens) in counts.items():
            before = total.get(language, (0, 0))
            total[language] = (before[0] + unknown, before[1] + tokens)
    return dict(sorted(total.items(), key=lambda item: (-item[1][0] / item[1][1], item[0])))


def unknown_sentence(counts: Mapping[str, tuple[int, int]]) -> str:
    """How much of the texts the model's tokenizer does not know.

    >>> unknown_sentence({"amh": (90, 100), "eng": (1, 10000), "fra": (0, 10), "swa": (0, 10)})
    'Tokens of texts that the model does not know: Amharic 90.0 %; below 0.1 % in English, French and Swahili.'
    >>> unknown_sentence({"eng": (0, 10)})
    'The model knows every token of the texts.'
    >>> unknown_sentence({"all": (1, 8)})
    'Of the tokens of the texts, 12.5 % are unknown to the model.'

    Args:
        counts: see `unknown_counts`.
    """
    if not counts:
        return ""
    if not any(unknown for unknown, _ in counts.values()):
        return "The model knows every token of the texts."
    shares = {language_name(code): unknown / tokens for code, (unknown, tokens) in counts.items()}
    if len(shares) == 1:
        share = next(iter(shares.values()))
        much = f"{100 * share:.1f} %" if share >= _FEW else f"less than {100 * _FEW:g} %"
        return f"Of the tokens of the texts, {much} are unknown to the model."
    parts = [", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items() if share >= _FEW)]
    few = [name for name, share in shares.items() if share < _FEW]
    if few:
        parts.append(f"below {100 * _FEW:g} % in {' and '.join(filter(None, (', '.join(few[:-1]), few[-1])))}")
    return f"Tokens of texts that the model does not know: {'; '.join(filter(None, parts))}."
