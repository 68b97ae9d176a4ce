"""Minimising a function on the unit cube by few evaluations, several at once: what to ask next, and nothing else.

`BayesianSearch` fits a Gaussian process to all that is known (Matern 5/2 with a length per coordinate, and noise),
standardised, and asks where the expected improvement (Mockus, 1975; Jones et al., 1998)

    EI(x) = (y* - m(x)) Phi(z) + s(x) phi(z),   z = (y* - m(x)) / s(x),   y* the lowest value so far,

is largest: among 512 scrambled Sobol points and the neighbours of the best points known. Several points are asked at
once by the constant liar (Ginsbourger et al., 2010): each is taken to have given y* until the values are there. There
is no inner optimizer, and points are rounded, so that equal values give equal questions.

A search is asked and told by who evaluates; many run side by side, a client each.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from fedtailor.core.seeding import seed_for

Points = npt.NDArray[np.float64]

DECIMALS: Final = 3
"""Points are rounded to so many: what is asked does not hang on the last bits of a fit."""
_SOBOL_POWER, _INCUMBENTS, _STEPS = 9, 3, (0.05, 0.1, 0.2)
_LEAST_NOISE: Final = 1e-4
"""Of the process, as a share of the values' variance."""


class Search(Protocol):
    """What proposes points of the unit cube."""

    def ask(self, most: int) -> Points:
        """Up to ``most`` new points, (n, d); none if there is nothing left to ask."""

    def tell(self, values: Points) -> None:
        """Values of the points that were asked last, (n,)."""


@dataclass
class Known:
    """Points and their values, in the order in which they were told.

    Args:
        x: points, (n, d).
        y: values, (n,).
    """

    x: Points
    y: Points

    @classmethod
    def none(cls, dims: int) -> Known:
        """Nothing yet, of ``dims`` coordinates."""
        return cls(np.empty((0, dims)), np.empty(0))

    def add(self, points: Points, values: Points) -> None:
        """Keeps further ones."""
        self.x, self.y = np.concatenate([self.x, points]), np.concatenate([self.y, values])

    def best(self, most: int) -> Points:
        """The points of the lowest values, (n, d), the lowest first."""
        return self.x[np.argsort(self.y, kind="stable")[:most]]


def sobol(dims: int, count: int, *coordinates: int | str) -> Points:
    """The first ``count`` points of a scrambled Sobol sequence, (count, dims), rounded."""
    from scipy.stats import qmc  # a second that most runs need not wait for

    seed = np.random.Generator(np.random.PCG64(seed_for(*coordinates, "sobol")))
    power = max(0, int(count - 1).bit_length())
    drawn: Points = qmc.Sobol(dims, scramble=True, rng=seed).random_base2(power)[:count]
    return np.round(drawn, DECIMALS)


def ends(dims: int) -> Points:
    """All coordinates 0, and all 1."""
    return np.repeat([[0.0], [1.0]], dims, 1)


def unknown(points: Points, *known: Points) -> Points:
    """The points without those that are known or come twice, in their order."""
    seen = {row.tobytes() for rows in known for row in rows + 0.0}
    kept = []
    for point in points + 0.0:
        if (key := point.tobytes()) not in seen:
            seen.add(key)
            kept.append(point)
    return np.array(kept).reshape(-1, points.shape[1])


@dataclass
class DesignSearch:
    """Asks the points of a list, one after another, and learns nothing.

    Args:
        design: (n, d).
        known: what was told.
    """

    design: Points
    known: Known = field(init=False)
    _asked: Points = field(init=False)

    def __post_init__(self) -> None:
        self.design = unknown(self.design)
        self.known, self._asked = Known.none(self.design.shape[1]), self.design[:0]

    def ask(self, most: int) -> Points:
        """The next ones of the list."""
        start = len(self.known.y)
        self._asked = self.design[start : start + most]
        return self._asked

    def tell(self, values: Points) -> None:
        """Keeps the values."""
        self.known.add(self._asked, values)


@dataclass
class BayesianSearch:
    """Expected improvement of a Gaussian process.

    Args:
        known: what it starts from; told values are added.
        design: points that are asked first, whatever they give, (n, d).
        coordinates: of its random points; the same ones give the same search.
    """

    known: Known
    design: Points
    coordinates: tuple[int | str, ...]
    _asked: Points = field(init=False)

    def __post_init__(self) -> None:
        self._asked = self.design[:0]

    def ask(self, most: int) -> Points:
        """What is left of the design, then the points of the largest expected improvement, one after another."""
        left = unknown(self.design, self.known.x)
        self._asked = left[:most] if len(left) or not most else self._improving(most)
        return self._asked

    def tell(self, values: Points) -> None:
        """Keeps the values of the points asked last."""
        self.known.add(self._asked, values)

    def _improving(self, most: int) -> Points:
        known = self.known
        dims = known.x.shape[1]
        drawn = sobol(dims, 2**_SOBOL_POWER, *self.coordinates, len(known.y))
        points = unknown(np.concatenate([drawn, *map(neighbours, known.best(_INCUMBENTS))]), known.x)
        chosen: list[int] = []
        with single_thread():
            process = _fitted(known.x, _standardised(known.y))
            for _ in range(min(most, len(points))):
                lies = np.full(len(chosen), _standardised(known.y).min())
                gain = _expected_improvement(process, known, points, points[chosen], lies)
                gain[chosen] = -np.inf
                chosen.append(int(np.argmax(gain)))
        return points[chosen]


def neighbours(point: Points) -> Points:
    """A point with one coordinate changed, to 0, to 1 or by a step, (n, d)."""
    found = []
    for axis, value in enumerate(point):
        for other in (0.0, 1.0, *(value + sign * step for step in _STEPS for sign in (-1, 1))):
            moved = point.copy()
            moved[axis] = min(1.0, max(0.0, other))
            found.append(moved)
    points: Points = np.array(found)
    return np.round(points, DECIMALS)


def _standardised(y: Points) -> Points:
    spread = float(y.std())
    values: Points = (y - y.mean()) / (spread if spread > 0 else 1.0)
    return values


def _fitted(x: Points, y: Points) -> Any:
    """A Gaussian process of the standardised values, its kernel's parameters by marginal likelihood, one start."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    smooth = ConstantKernel(1.0, (1e-2, 1e2)) * Matern(np.full(x.shape[1], 0.5), (5e-2, 1e1), nu=2.5)
    process = GaussianProcessRegressor(smooth + WhiteKernel(1e-3, (_LEAST_NOISE, 1e-1)), n_restarts_optimizer=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # a parameter at its bound, as a flat coordinate's is
        return process.fit(x, y)


def _expected_improvement(process: Any, known: Known, points: Points, pending: Points, lies: Points) -> Points:
    from scipy.special import ndtr
    from sklearn.gaussian_process import GaussianProcessRegressor

    y = _standardised(known.y)
    if len(pending):
        again = GaussianProcessRegressor(process.kernel_, optimizer=None)
        process = again.fit(np.concatenate([known.x, pending]), np.concatenate([y, lies]))
    mean, deviation = process.predict(points, return_std=True)
    # Of the function, not of another noisy look at it.
    spread = np.sqrt(np.maximum(deviation**2 - process.kernel_.k2.noise_level, 1e-12))
    z = (y.min() - mean) / spread
    improvement: Points = spread * (z * ndtr(z) + np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))
    return improvement


@contextmanager
def single_thread() -> Iterator[None]:
    """Sums in one order: on how many threads a library adds up would show in the last bits."""
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    with threadpool_limits(1):
        yield
