"""The grids of PF2LoRA (Hao et al., arXiv 2503.03920, appendices C, K, L), as dotted keys of the configuration.

Every method is searched alone on every data set: learning rates only, in pairs where a method has two. What was picked
differs by data set (`TABLES`); the defaults are those of most GLUE sets (`PICKED`). What decided the paper does not
say; here all are judged on the train texts of the seen clients, since the test texts are what is reported. HETLoRA's
gamma and penalty were not searched but in the synthetic task.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tune_spaces.grid import Grid, Space, Value

GLUE: Final = (1e-4, 5e-4, 1e-3, 2e-3, 5e-3)
"""C.1. Per-FedAvg-LoRA's choice of 1e-2 on CoLA (Table 6) lies outside of it."""
SQUAD: Final = (*GLUE, 1e-2)
"""C.2."""
NLG: Final = (1e-4, 5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 5e-3)
"""C.3."""

_ONE_RATE: Final = ("centralised_lora", "homlora", "hetlora")
_TWO_RATES: Final = ("perfedavg_lora", "pf2lora")
_TRAIN: Final = "train_accuracy"


def _rates(method: str, values: tuple[float, ...]) -> Space:
    """5 to 7 trials, or all pairs for methods with an inner rate."""
    keys = ("lr", "inner_lr") if method in _TWO_RATES else ("lr",)
    return {f"{method}.{key}": values for key in keys}


HETLORA_SYNTHETIC: Final[Space] = {
    "hetlora.penalty": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5),
    "hetlora.lr": (0.001, 0.002, 0.003, 0.004, 0.005),
}
"""K.1, 50 trials; the paper calls the penalty gamma there."""

_THOUSANDTHS: Final = (0.001, 0.002, 0.003, 0.004, 0.005, 0.006, 0.007, 0.008, 0.009, 0.01)
PF2LORA_SYNTHETIC: Final[Space] = {"pf2lora.lr": _THOUSANDTHS, "pf2lora.inner_lr": _THOUSANDTHS}
"""K.2, 100 trials."""

ALPHA: Final[Space] = {"pf2lora.inner_lr": GLUE}
RANK: Final[Space] = {"pf2lora.rank": (2, 4, 8, 12, 16)}
"""L and Figure 5, whose values are in no text: alpha over the rates of C.1, ranks around 8, where it gets flat."""

_SETS: Final = (("", GLUE, "C.1"), ("_squad", SQUAD, "C.2"), ("_nlg", NLG, "C.3"))

GRIDS: Final[Mapping[str, Grid]] = {
    **{
        f"{method}{suffix}": Grid(
            method, _rates(method, values), _TRAIN, f"{place} does not say what decided; judged on train texts"
        )
        for suffix, values, place in _SETS
        for method in (*_ONE_RATE, *_TWO_RATES)
    },
    "hetlora_synthetic": Grid("hetlora", HETLORA_SYNTHETIC, _TRAIN, "K.1: penalty and rate of the synthetic task"),
    "pf2lora_synthetic": Grid("pf2lora", PF2LORA_SYNTHETIC, _TRAIN, "K.2: both rates of the synthetic task"),
    "alpha": Grid("pf2lora", ALPHA, _TRAIN, "L: sensitivity to the client's rate"),
    "rank": Grid("pf2lora", RANK, _TRAIN, "L: sensitivity to the common rank"),
}
"""Name of the search to its grid."""

PICKED: Final[Mapping[str, Value]] = {
    "centralised_lora.lr": 1e-3,
    "homlora.lr": 1e-3,
    "hetlora.lr": 2e-3,
    "perfedavg_lora.lr": 1e-3,
    "perfedavg_lora.inner_lr": 1e-3,
    "pf2lora.lr": 1e-3,
    "pf2lora.inner_lr": 1e-3,
    "pf2lora.rank": 8,
}
"""The defaults: Table 6's most frequent choices. Of the centralised row it prints CoLA's alone."""


def _table(*rates: float | tuple[float, float] | None) -> dict[str, Value]:
    """What was picked, by key, in the order of `_ONE_RATE` and `_TWO_RATES`; None: not printed."""
    found: dict[str, Value] = {}
    for method, rate in zip((*_ONE_RATE, *_TWO_RATES), rates, strict=True):
        pair = rate if isinstance(rate, tuple) else (rate,)
        keys = ("lr", "inner_lr")[: len(pair)]
        found |= {f"{method}.{key}": value for key, value in zip(keys, pair, strict=True) if value is not None}
    return found


TABLES: Final[Mapping[str, Mapping[str, Value]]] = {
    "cola": _table(1e-3, 1e-3, 5e-3, (2e-3, 1e-2), (2e-3, 1e-4)),
    "mnli": _table(None, 1e-3, 2e-3, (1e-3, 1e-3), (1e-3, 1e-3)),
    "sst2": _table(None, 2e-3, 2e-3, (1e-3, 1e-3), (1e-3, 1e-3)),
    "qqp": _table(None, 1e-3, 2e-3, (1e-3, 1e-3), (1e-3, 1e-3)),
    "qnli": _table(None, 1e-3, 2e-3, (2e-3, 1e-3), (1e-3, 1e-3)),
    "squad_v1": _table(1e-3, 1e-3, 5e-3, (2e-3, 1e-3), (2e-3, 1e-2)),
    "squad_v2": _table(5e-4, 5e-4, 5e-3, (1e-3, 1e-3), (1e-3, 1e-2)),
    "webnlg": _table(1e-3, 1e-3, 2e-3, (2e-3, 1e-4), (2e-3, 1e-3)),
    "e2e": _table(1e-3, 1e-3, 2e-3, (2e-3, 2e-3), (3e-3, 5e-4)),
    "webnlg_xl": _table(None, 1e-3, 1e-3, (1e-3, 1e-4), (1e-3, 1e-4)),
}
"""Tables 6, 9, 11 and 12: data set (``webnlg_xl``: GPT2-XL's) to what was picked on it."""
