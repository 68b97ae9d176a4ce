"""Groups of points by k-means, as many as the silhouette says: of a projection's layers, of validation rows.

pFedGPT (Shen et al., EMNLP 2025, section 4.3) clusters the layers of a projection by four numbers each, how far the
client's LoRA is from the global one, and how far the changes of both are apart (`layer_features`); its validation rows
by their embeddings. It names neither the algorithm nor the scale of the numbers nor how many clusters there are.
"""

from __future__ import annotations

import warnings
from typing import Final

import numpy as np

from fedtailor.core.seeding import seed_for
from fedtailor.lanes.batches import IntArray
from fedtailor.training.search import Points, single_thread

MOST_CLUSTERS: Final = 4
FEWEST_POINTS: Final = 4
"""Fewer are one cluster."""
LEAST_SILHOUETTE: Final = 0.2
"""A clustering with a mean silhouette below that is none."""
_STARTS = 10


def clusters(points: Points, coordinates: tuple[int | str, ...], asked: int | None = None) -> IntArray:
    """The cluster of each point, (n,), numbered in the order in which they first occur.

    Args:
        points: (n, d).
        coordinates: of the random starts.
        asked: how many clusters; None: 2 to `MOST_CLUSTERS` by the best mean silhouette (Rousseeuw, 1987), 1 where
            that is below `LEAST_SILHOUETTE` or there are fewer than `FEWEST_POINTS` points.
    """
    distinct = len(np.unique(points, axis=0))
    one = np.zeros(len(points), np.int64)
    if asked is not None:
        return one if min(asked, distinct) < 2 else _k_means(points, min(asked, distinct), coordinates)
    if len(points) < FEWEST_POINTS:
        return one
    best, found = LEAST_SILHOUETTE, one
    for k in range(2, min(MOST_CLUSTERS, distinct, len(points) - 1) + 1):
        labels = _k_means(points, k, coordinates)
        if (score := _silhouette(points, labels)) > best:
            best, found = score, labels
    return found


def _k_means(points: Points, k: int, coordinates: tuple[int | str, ...]) -> IntArray:
    from sklearn.cluster import KMeans  # a second that most runs need not wait for
    from sklearn.exceptions import ConvergenceWarning

    seed = seed_for(*coordinates, "k-means", k) % 2**32
    with single_thread(), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct points than clusters, to rounding
        labels = KMeans(k, n_init=_STARTS, random_state=seed).fit_predict(points)
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse].astype(np.int64)


def _silhouette(points: Points, labels: IntArray) -> float:
    from sklearn.metrics import silhouette_score

    if not 1 < len(np.unique(labels)) < len(points):
        return -1.0
    with single_thread():
        return float(silhouette_score(points, labels))


def layer_features(distances: Points) -> Points:
    """Numbers of different orders of magnitude on one scale: z-scores of log(1 + x / median), column by column.

    Args:
        distances: not negative, (layers, features).

    Returns:
        As many; a column without differences is 0.
    """
    median = np.median(distances, axis=0)
    logs = np.log1p(distances / np.where(median > 0, median, 1.0))
    spread = logs.std(axis=0)
    scores: Points = (logs - logs.mean(axis=0)) / np.where(spread > 1e-12, spread, 1.0)
    return scores


def stratified(labels: IntArray, count: int, rng: np.random.Generator) -> IntArray:
    """Indices of a sample that has each cluster's share, in ascending order.

    Shares are rounded by the largest remainder, which loses none (the paper's floors can empty a cluster, or all), and
    every cluster has one row at least.

    Args:
        labels: cluster of each row, (n,).
        count: rows that are wanted, at most all; at least as many as clusters are taken.
        rng: draws them.

    >>> stratified(np.array([0, 0, 0, 0, 0, 0, 1, 1]), 4, np.random.default_rng(0)).tolist()[-1] >= 6
    True
    """
    members = [np.flatnonzero(labels == k) for k in range(int(labels.max()) + 1)]
    shares = np.array([count * len(own) / len(labels) for own in members])
    numbers = np.maximum(1, np.floor(shares))
    while numbers.sum() != max(count, len(members)):
        step = 1 if numbers.sum() < count else -1
        # Who is furthest from its share, and of those that may lose a row only who has another.
        behind = np.where((step > 0) | (numbers > 1), step * (shares - numbers), -np.inf)
        numbers[int(np.argmax(behind))] += step
    taken = [rng.choice(own, int(number), replace=False) for own, number in zip(members, numbers, strict=True)]
    return np.sort(np.concatenate(taken))
