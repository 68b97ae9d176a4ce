"""Searches on the unit cube: what is planted is found, with fewer questions than by chance; nothing is asked twice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fedtailor.core.seeding import numpy_rng
from fedtailor.methods.fdlora import EvolutionSearch, FdLoraConfig
from fedtailor.training.clusters import clusters, layer_features, stratified
from fedtailor.training.search import BayesianSearch, DesignSearch, Known, Points, Search, ends, sobol

SEEDS = range(20)


def planted(dims: int, seed: int) -> tuple[Points, Callable[[Points], Points]]:
    """One cluster of layers is the client's own, the rest the common one: where, and an excess of 1 at w = 0."""
    rng = numpy_rng("planted", seed, dims)
    target, slope = np.zeros(dims), rng.uniform(0.5, 2, dims)
    target[own := int(rng.integers(dims))] = 1.0
    return target, lambda x: (slope * (x - target) ** 2).sum(1) / slope[own]


def evaluated(search: Search, loss: Callable[[Points], Points], count: int, width: int) -> None:
    done = 0
    while done < count:
        points = search.ask(min(width, count - done))
        search.tell(loss(points))
        done += len(points)


def bayesian(dims: int, seed: int) -> BayesianSearch:
    design = np.concatenate([ends(dims), sobol(dims, 3, seed)])
    return BayesianSearch(Known.none(dims), design, (seed, "hbo"))


def by_chance(dims: int, count: int, seed: int) -> DesignSearch:
    return DesignSearch(np.concatenate([ends(dims), numpy_rng(seed, "random").random((count - 2, dims))]))


def test_in_4_dimensions_64_evaluations_come_within_a_tenth() -> None:
    for seed in (0, 7):
        target, loss = planted(4, seed)
        search = bayesian(4, seed)
        evaluated(search, loss, 64, 8)
        assert np.abs(search.known.best(1)[0] - target).max() <= 0.1


@pytest.mark.parametrize("dims", [4, 6])
def test_the_default_20_evaluations_leave_little_and_less_than_chance(dims: int) -> None:
    left, chance = [], []
    for seed in SEEDS:
        _, loss = planted(dims, seed)
        search, other = bayesian(dims, seed), by_chance(dims, 20, seed)
        evaluated(search, loss, 20, 4)
        evaluated(other, loss, 20, 4)
        assert len(search.known.y) == len(other.known.y) == 20
        left.append(search.known.y.min())
        chance.append(other.known.y.min())
    assert np.median(left) <= 0.15
    assert np.median(left) <= 0.5 * np.median(chance)


def test_it_starts_from_what_is_known_and_asks_nothing_twice() -> None:
    _, loss = planted(3, 1)
    points = np.array([[0.2, 0.2, 0.9], [0.0, 0.0, 0.0]])
    search = BayesianSearch(Known(points, loss(points)), np.empty((0, 3)), (1,))
    evaluated(search, loss, 9, 2)
    assert len(np.unique(search.known.x, axis=0)) == 11
    assert (search.known.x == np.round(search.known.x, 3)).all()


def test_equal_values_are_equal_questions_and_rounding_of_values_changes_none() -> None:
    found = []
    for noise in (0.0, 0.0, 1e-15):
        _, loss = planted(4, 3)
        search = bayesian(4, 3)
        evaluated(search, lambda x, noise=noise, loss=loss: loss(x) * (1 + noise), 12, 4)  # type: ignore[misc]
        found.append(search.known.x)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_a_flat_function_is_searched_to_the_end() -> None:
    search = bayesian(2, 0)
    evaluated(search, lambda x: np.ones(len(x)), 12, 4)
    assert len(search.known.y) == 12


def test_evolution_finds_what_lies_outside_of_the_mixes_of_both() -> None:
    target = np.array([1.1, 0.6])
    found = []
    for seed in SEEDS:
        search = EvolutionSearch(FdLoraConfig(penalty=0.0), (seed,))
        evaluated(search, lambda x: ((x - target) ** 2).sum(1), 20, 4)
        found.append(search.known.y.min())
        assert (np.abs(search.known.x) <= 1.5).all()
    assert np.median(found) < 0.05 < 0.46  # of (1, 0), the nearest that is given


def test_layers_of_two_kinds_are_two_clusters_and_of_one_kind_one() -> None:
    rng = np.random.default_rng(0)
    spread = np.exp(0.1 * rng.standard_normal((8, 4)))
    scales = np.array([1e-3, 1e-8, 1.0, 10.0])
    two = spread * scales
    two[[1, 4, 5]] *= 20
    assert clusters(layer_features(two), (0,)).tolist() == [0, 1, 0, 0, 1, 1, 0, 0]
    assert clusters(layer_features(np.tile(scales, (8, 1))), (0,)).tolist() == [0] * 8
    assert clusters(layer_features(two)[:3], (0,)).tolist() == [0] * 3
    assert len(set(clusters(layer_features(two), (0,), 5).tolist())) == 5


def test_a_sample_has_each_clusters_share_and_a_row_of_each() -> None:
    labels = np.array([0] * 30 + [1] * 8 + [2] * 2)
    taken = labels[stratified(labels, 10, np.random.default_rng(0))]
    assert np.bincount(taken).tolist() == [7, 2, 1]
    assert len(np.unique(stratified(labels, 10, np.random.default_rng(1)))) == 10
    assert np.bincount(labels[stratified(labels, 1, np.random.default_rng(0))]).min() == 1
