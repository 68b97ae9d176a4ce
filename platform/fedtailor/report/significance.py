"""Is one method better than another? Paired t-tests over clients, Holm-corrected; as numbers, sentences and tables.

A client's score (its accuracy, or the mean over its answers) is averaged over the seeds that both methods have; the
test is on the differences between the two methods over clients (Student's t for paired samples). Within a pool and
budget, the p-values of all pairs are corrected together: S. Holm, A Simple Sequentially Rejective Multiple Test
Procedure, Scand. J. Statist. 6 (1979), 65-70.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from fedtailor.report import names
from fedtailor.report.grid import Grid
from fedtailor.report.measures import ACCURACY, Measure
from fedtailor.report.names import ABSENT
from fedtailor.report.scores import REFERENCE, Block, client_scores, primary
from fedtailor.report.tables import file_label

LEVEL = 0.05
CENTRES = (REFERENCE, "prior_shift", "lora", "fedp2eft")
"""Every other method is compared with each of these."""

NOT_COMPARED = ("majority",)
"""A floor, no method."""

_RULE = (
    "Each client's {phrase} is averaged over seeds; the difference of two methods is then tested over clients with a "
    "paired t-test (two-sided), which takes clients as independent. p-values are Holm-corrected over all pairs of a "
    "pool and budget; below {level:g} the verdict is 'better' or 'worse', else 'undecided'. The 95 % intervals are "
    "of the single comparisons, without correction."
)

Verdict = Literal["better", "worse", "undecided"]

COLUMNS = (
    "pool", "budget", "method", "other", "n_clients", "mean_difference", "standard_error", "ci95_low", "ci95_high",
    "p", "p_holm", "verdict",
)  # fmt: skip

_NOISE = 12
MARKS: Mapping[Verdict, str] = {"better": "▲", "undecided": "", "worse": "▼"}
Key = tuple[str, str]
"""Method and the one it is compared with."""


@dataclass(frozen=True)
class Pair:
    """``method`` against ``other``, in fractions. Without a spread (one client) there is no interval and no p.

    Args:
        budget: r, None where no method of the run has budgets.
        difference: mean over clients of score(method) - score(other).
        interval: 95 % confidence interval of the difference.
        p: two-sided, of this test alone; ``p_holm`` corrected over the pairs of the same pool and budget.
    """

    pool: str
    budget: int | None
    method: str
    other: str
    n_clients: int
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None = None

    @property
    def verdict(self) -> Verdict:
        """Of ``method``, at `LEVEL` after correction."""
        if self.p_holm is None or self.p_holm >= LEVEL:
            return "undecided"
        return "better" if self.difference > 0 else "worse"


P = TypeVar("P", bound=Pair)


def compare(scored: pd.DataFrame, found: Sequence[Block]) -> list[Pair]:
    """All pairs of every block, in order of pool, budget, method.

    Args:
        scored: rows of `scores.scored_rows`.
        found: blocks of the tables.
    """
    clients = client_scores(scored[scored["metric"] == primary(scored).name])
    pairs = []
    for block in found:
        here = clients[(clients["pool"] == block.pool) & clients["budget"].isin([-1, block.budget or -1])]
        # As in the tables: a method with budgets and a stray row without is taken at its budget.
        here = here.sort_values("budget", ascending=False, kind="stable").drop_duplicates(["method", "seed", "client"])
        wide = here.pivot_table(index=["client", "seed"], columns="method", values="value")
        pairs += corrected([_pair(block, wide, one, other) for one, other in _opponents(block.methods)])
    return pairs


def rule(measure: Measure = ACCURACY) -> str:
    """What the tests are, for readers of a report."""
    return _RULE.format(phrase=measure.phrase, level=LEVEL)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction, in the order given.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    values = np.asarray(p_values, np.float64)
    order = np.argsort(values, kind="stable")
    steps = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    corrected = np.empty(len(values))
    corrected[order] = np.minimum(steps, 1.0)
    return [float(value) for value in corrected]


def table(pairs: Sequence[Pair]) -> pd.DataFrame:
    """``significance.csv``: `COLUMNS`, a row per pair; differences are fractions, budget -1 where there is none."""
    rows = [
        (
            p.pool, -1 if p.budget is None else p.budget, p.method, p.other, p.n_clients, p.difference,
            p.standard_error, *(p.interval or (None, None)), p.p, p.p_holm, p.verdict,
        )
        for p in pairs
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=list(COLUMNS))


def against_base(pairs: Sequence[Pair]) -> Mapping[tuple[str, int | None, str], Pair]:
    """(pool, budget, method) to the comparison with the base model."""
    return {(pair.pool, pair.budget, pair.method): pair for pair in pairs if pair.other == REFERENCE}


def _opponents(methods: Sequence[str]) -> list[tuple[str, str]]:
    """Later method against earlier one, in the order of the tables."""
    ordered = [name for name in names.in_method_order(methods) if name not in NOT_COMPARED]
    chosen = [(b, a) for a, b in combinations(ordered, 2) if a in CENTRES or b in CENTRES]
    return sorted(chosen, key=lambda pair: (ordered.index(pair[0]), ordered.index(pair[1])))


def _pair(block: Block, wide: pd.DataFrame, one: str, other: str) -> Pair:
    both = wide[[one, other]].dropna()
    gain = (both[one] - both[other]).groupby(level="client").mean()
    return paired(Pair(block.pool, block.budget, one, other, 0, 0.0, None, None, None), gain.to_numpy(np.float64))


def paired(blank: P, gain: npt.NDArray[np.float64]) -> P:
    """``blank`` with the paired t-test over clients (Student, 1908); without two clients there is no test.

    Args:
        blank: its coordinates: pool, budget and who is compared.
        gain: (n,) difference per client, a fraction.
    """
    # Equal scores must give exactly no difference, whatever the rounding of the means.
    values: npt.NDArray[np.float64] = np.round(gain, _NOISE)
    mean, n = float(values.mean()) if len(values) else float("nan"), len(values)
    known = replace(blank, n_clients=n, difference=mean)
    if n < 2:
        return known
    if np.ptp(values) == 0:
        # No spread: a shift of all clients alike, or no difference at all.
        return replace(known, standard_error=0.0, interval=(mean, mean), p=1.0 if mean == 0 else 0.0)
    test = stats.ttest_1samp(values, 0.0)
    low, high = test.confidence_interval(0.95)
    error = float(values.std(ddof=1) / np.sqrt(n))
    return replace(known, standard_error=error, interval=(float(low), float(high)), p=float(test.pvalue))


def corrected(pairs: Sequence[P]) -> list[P]:
    """The pairs that have a client in common, with `Pair.p_holm` over all that were tested."""
    tested = [pair.p for pair in pairs if pair.p is not None]
    found = iter(holm(tested))
    pairs = [pair for pair in pairs if pair.n_clients]
    return [pair if pair.p is None else replace(pair, p_holm=next(found)) for pair in pairs]


def p_text(p: float | None) -> str:
    """A p-value as printed, ``<0.001`` below that.

    >>> p_text(0.04123), p_text(0.00001), p_text(None)
    ('0.041', '<0.001', '–')
    """
    if p is None:
        return ABSENT
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def interval_text(pair: Pair) -> str:
    """``[+0.40, +2.06]`` in points."""
    return ABSENT if pair.interval is None else f"[{names.points(pair.interval[0])}, {names.points(pair.interval[1])}]"


def pair_title(key: Key) -> str:
    """``FedP²EFT – LoRA``, the order of the subtraction."""
    return f"{names.method_name(key[0])} – {names.method_name(key[1])}"


def by_pair(pairs: Sequence[Pair], pool: str) -> tuple[list[int | None], dict[Key, dict[int | None, Pair]]]:
    """Budgets, and for each (method, other) the comparison at each budget."""
    here = [pair for pair in pairs if pair.pool == pool]
    rows: dict[Key, dict[int | None, Pair]] = {}
    for pair in here:
        rows.setdefault((pair.method, pair.other), {})[pair.budget] = pair
    order = names.in_method_order(name for key in rows for name in key)
    return names.in_budget_order(pair.budget for pair in here), dict(
        sorted(rows.items(), key=lambda row: tuple(map(order.index, row[0])))
    )


def sentences(pairs: Sequence[Pair], pool: str) -> list[str]:
    """A sentence per method of a pool: against whom it is better, worse or undecided, and at which budgets."""
    _, rows = by_pair(pairs, pool)
    found = []
    for method in reversed(names.in_method_order(key[0] for key in rows)):
        parts = []
        for verdict, words in (("better", "better than"), ("worse", "worse than"), ("undecided", "undecided against")):
            whom = [
                f"{names.method_name(other)}{_where(at, verdict)}"
                for (one, other), at in rows.items()
                if one == method and any(pair.verdict == verdict for pair in at.values())
            ]
            parts += [f"{words} {', '.join(whom)}"] if whom else []
        found.append(f"{names.method_name(method)}: {'; '.join(parts)}.")
    return found


def _where(at: Mapping[int | None, Pair], verdict: str) -> str:
    hits = [str(budget) for budget, pair in at.items() if pair.verdict == verdict and budget is not None]
    if not hits or len(hits) == len(at):
        return ""
    return f" (r = {', '.join(hits)})"


def pairs_grids(pairs: Sequence[Pair], scale: str = "", measure: Measure = ACCURACY) -> list[Grid]:
    """``significance``: a table per pool, a row per pair, a column per budget.

    Args:
        pairs: all comparisons.
        scale: a sentence on a run that was made smaller.
        measure: what is compared.
    """
    rules = [f"Mean difference in {measure.phrase} (points), its 95 % interval, and the corrected p; "
             "▲ better, ▼ worse, no mark undecided.", *filter(None, [scale]), rule(measure)]  # fmt: skip
    found = []
    for pool in names.in_pool_order(pair.pool for pair in pairs):
        (budgets, rows), sizes = by_pair(pairs, pool), (pair.n_clients for pair in pairs if pair.pool == pool)
        who = f"{names.pool_name(pool)} ({names.format_range(sizes)} clients)"
        found.append(
            Grid(
                header=["Pair", *map(names.budget_title, budgets)],
                rows=[[pair_title(key), *(_cell(at.get(b)) for b in budgets)] for key, at in rows.items()],
                caption=[f"{who}.", *rules],
                title=f"{who}: paired comparisons",
                label=f"pairs-{file_label(pool)}",
                notes=sentences(pairs, pool),
            )
        )
    return found


def _cell(pair: Pair | None) -> str:
    if pair is None:
        return ABSENT
    mark = MARKS[pair.verdict]
    return f"{names.points(pair.difference)}{f' {mark}' if mark else ''} {interval_text(pair)} p {p_text(pair.p_holm)}"
