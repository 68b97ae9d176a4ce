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
from dataclasses import dataclass
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
    return _epsilon(mechanism.sampler, _event(mechanism, spent), mechanism.delta)


@lru_cache(maxsize=64)
def noise_for(target: float, mechanism: Mechanism, spent: tuple[Spent, ...]) -> float:
    """The least noise multiplier, rounded up to thousandths, with which ``spent`` costs at most ``target``.

    Raises:
        ValueError: the target is out of reach between 0.01 and 1,000.
    """
    from dp_accounting import ExplicitBracketInterval, calibrate_dp_mechanism

    def event(noise: float) -> Any:
        return _event(_with(mechanism, noise), spent)

    low, high = 0.01, 1000.0
    if epsilon(_with(mechanism, low), spent) <= target:
        return low
    if epsilon(_with(mechanism, high), spent) > target:
        raise ValueError(f"epsilon {target:g} needs a noise multiplier above {high:g}")
    with _quiet():
        # Few orders can only ask for more noise than needed.
        found = calibrate_dp_mechanism(
            lambda: _accountant(mechanism.sampler, ORDERS), event, target, mechanism.delta,
            ExplicitBracketInterval(low, high), tol=_FINE,
        )  # fmt: skip
    noise = ceil(float(found) / _FINE) * _FINE
    while epsilon(_with(mechanism, round(noise, 3)), spent) > target:
        noise += _FINE
    return round(noise, 3)


def _with(mechanism: Mechanism, noise: float) -> Mechanism:
    return Mechanism(noise, mechanism.clip or 1.0, mechanism.delta, mechanism.sampler, mechanism.pool)


def _epsilon(sampler: Sampler, event: Any, delta: float) -> float:
    """The best bound over the orders; over all of the library's where the best lies at the end of ours."""
    with _quiet():
        found, order = _accountant(sampler, ORDERS).compose(event).get_epsilon_and_optimal_order(delta)
        if order >= _AT_THE_END:
            found = min(found, _accountant(sampler).compose(event).get_epsilon(delta))
    return float(found)


def _accountant(sampler: Sampler, orders: Sequence[float] | None = None) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    relations = {"fixed": NeighboringRelation.REPLACE_ONE, "poisson": NeighboringRelation.ADD_OR_REMOVE_ONE}
    return RdpAccountant(orders, neighboring_relation=relations[sampler])


def _event(mechanism: Mechanism, spent: Sequence[Spent]) -> Any:
    from dp_accounting import ComposedDpEvent, SelfComposedDpEvent

    groups: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
    for stage in spent:
        groups[stage.cohorts, stage.cohort].append(stage.releases)
    parts = []
    for (_, cohort), releases in sorted(groups.items()):
        together = Counter(sum(counts) for counts in zip_longest(*releases, fillvalue=0))
        parts += [
            SelfComposedDpEvent(_round(mechanism, cohort, times), rounds)
            for times, rounds in sorted(together.items())
            if times
        ]
    return ComposedDpEvent(parts)


def _round(mechanism: Mechanism, cohort: int, times: int) -> Any:
    """One round with ``times`` noised sums of the same cohort."""
    from dp_accounting import (
        GaussianDpEvent,
        PoissonSampledDpEvent,
        SampledWithoutReplacementDpEvent,
        SelfComposedDpEvent,
    )

    fixed = mechanism.sampler == "fixed"
    # The accountant wants noise per sensitivity, which is 2C for a replaced client and C for an added one.
    noise = mechanism.noise_multiplier / (2 if fixed else 1)
    event = GaussianDpEvent(noise) if times == 1 else SelfComposedDpEvent(GaussianDpEvent(noise), times)
    if cohort >= mechanism.pool:
        return event
    if fixed:
        return SampledWithoutReplacementDpEvent(mechanism.pool, cohort, event)
    return PoissonSampledDpEvent(cohort / mechanism.pool, event)


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
