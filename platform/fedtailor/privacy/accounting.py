"""Epsilon of what is really run, from Google's dp-accounting.

*Fixed cohorts* are sampled uniformly without replacement. Its accountant knows this for the relation "one client
replaced by another" (Wang, Balle, Kasiviswanathan, "Subsampled Renyi Differential Privacy and Analytical Moments
Accountant", AISTATS 2019, Theorem 27). A replaced client moves the sum of clipped updates by up to 2C, so that noise
of standard deviation z C counts as a multiplier of z / 2. A client that fails contributes 0, which is within that.

*Poisson cohorts* take each client independently (Mironov, Talwar, Zhang, "Renyi Differential Privacy of the Sampled
Gaussian Mechanism", 2019), for the relation "one client added or removed", where the sum moves by C. Papers mostly
report this one: it gives smaller numbers for the same noise, of a weaker relation.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import zip_longest
from math import ceil, inf
from typing import Any, Literal

Sampler = Literal["fixed", "poisson"]
_FINE = 1e-3

ORDERS = (
    1.25, 1.5, 1.6, 1.7, 1.8, 2, 2.25, 2.5, 2.75, 3, 3.25, 3.5, 3.75, 4, 4.5, 5, 5.5, 6, 7, 8, 9, 10, 11, 12, 14, 16,
    18, 20, 24, 28, 32, 40, 48, 64,
)  # fmt: skip
"""Renyi orders that are tried first: a tenth of the time of the library's own 156, and mostly the same result."""

_AT_THE_END = 48


@dataclass(frozen=True)
class Mechanism:
    """What is the same in all rounds of a run.

    Args:
        noise_multiplier: z; 0: no guarantee.
        clip: C; None: infinite, no guarantee.
        delta: probability with which the guarantee may fail.
        sampler: how cohorts are drawn.
        pool: number N of clients they are drawn from; taken as public.
    """

    noise_multiplier: float
    clip: float | None
    delta: float
    sampler: Sampler
    pool: int

    @property
    def clipping(self) -> str:
        """The clip, in words."""
        return "no clip" if self.clip is None else f"clip {self.clip:g}"

    @property
    def relation(self) -> str:
        """The neighbouring relation of epsilon, in words."""
        return "one client replaced" if self.sampler == "fixed" else "one client added or removed"


@dataclass(frozen=True)
class Spent:
    """Releases of one stage.

    Args:
        cohorts: name of the stream that its cohorts come from, e.g. ``strategy/seed42``: stages of one name meet the
            same clients in the same round.
        cohort: clients per round (Poisson: expected).
        releases: noised sums of each round, mostly 1.
    """

    cohorts: str
    cohort: int
    releases: tuple[int, ...]


def default_delta(pool: int) -> float:
    """N^-1.1: below one over the number of clients.

    >>> round(default_delta(160), 6)
    0.003762
    """
    return float(pool**-1.1)


@lru_cache(maxsize=4096)
def epsilon(mechanism: Mechanism, spent: tuple[Spent, ...]) -> float:
    """Epsilon at the mechanism's delta of all these releases together; infinite without noise.

    Stages that meet the same cohorts are one mechanism with several outputs per round: amplification by sampling is
    counted once for them, not once each.
    """
    if not any(sum(stage.releases) for stage in spent):
        return 0.0
    if not mechanism.noise_multiplier or mechanism.clip is None:
        return inf
    event = _event(mechanism, spent)
    with _quiet():
        found, order = _accountant(mechanism, ORDERS).compose(event).get_epsilon_and_optimal_order(mechanism.delta)
        if order >= _AT_THE_END:  # the best of all the library's orders may lie beyond ours
            found = min(found, _accountant(mechanism).compose(event).get_epsilon(mechanism.delta))
    return float(found)


@lru_cache(maxsize=64)
def noise_for(target: float, mechanism: Mechanism, spent: tuple[Spent, ...]) -> float:
    """The least noise multiplier, rounded up to thousandths, with which ``spent`` costs at most ``target``.

    Raises:
        ValueError: the target is out of reach between 0.01 and 1,000.
    """
    from dp_accounting import ExplicitBracketInterval, calibrate_dp_mechanism

    def having(noise: float) -> Mechanism:
        return replace(mechanism, noise_multiplier=noise, clip=mechanism.clip or 1.0)

    low, high = 0.01, 1000.0
    if epsilon(having(low), spent) <= target:
        return low
    if epsilon(having(high), spent) > target:
        raise ValueError(f"epsilon {target:g} needs a noise multiplier above {high:g}")
    with _quiet():
        # Few orders can only ask for more noise than needed.
        found = calibrate_dp_mechanism(
            lambda: _accountant(mechanism, ORDERS), lambda noise: _event(having(noise), spent), target,
            mechanism.delta, ExplicitBracketInterval(low, high), tol=_FINE,
        )  # fmt: skip
    noise = ceil(float(found) / _FINE) * _FINE
    while epsilon(having(round(noise, 3)), spent) > target:
        noise += _FINE
    return round(noise, 3)


def _accountant(mechanism: Mechanism, orders: Sequence[float] | None = None) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    relations = {"fixed": NeighboringRelation.REPLACE_ONE, "poisson": NeighboringRelation.ADD_OR_REMOVE_ONE}
    return RdpAccountant(orders, neighboring_relation=relations[mechanism.sampler])


def _event(mechanism: Mechanism, spent: Sequence[Spent]) -> Any:
    import dp_accounting as dp

    fixed = mechanism.sampler == "fixed"
    # The accountant wants noise per sensitivity, which is 2C for a replaced client and C for an added one.
    gauss = dp.GaussianDpEvent(mechanism.noise_multiplier / (2 if fixed else 1))
    groups: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
    for stage in spent:
        groups[stage.cohorts, stage.cohort].append(stage.releases)
    parts = []
    for (_, cohort), releases in sorted(groups.items()):
        rounds = Counter(sum(counts) for counts in zip_longest(*releases, fillvalue=0))
        for times, count in sorted(rounds.items()):
            if not times:
                continue
            # One round with this many noised sums of the same cohort.
            event = gauss if times == 1 else dp.SelfComposedDpEvent(gauss, times)
            if cohort < mechanism.pool and fixed:
                event = dp.SampledWithoutReplacementDpEvent(mechanism.pool, cohort, event)
            elif cohort < mechanism.pool:
                event = dp.PoissonSampledDpEvent(cohort / mechanism.pool, event)
            parts.append(dp.SelfComposedDpEvent(event, count))
    return dp.ComposedDpEvent(parts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without its notes on Renyi orders that it leaves out, which only loosens the bound."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)
