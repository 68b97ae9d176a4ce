"""Pools of a parallel data set: which row numbers go where, the same in every language.

A premise of such data stands in several rows (XNLI: three, one per class) and, by chance of translation, two
premises of one language may be one text in another. Rows that are linked in this way in any language form a
group, and a group goes to one pool and one split: no premise is ever in two of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.source import POOLS, SPLITS, Pool, Split, normalise

Ints = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Rows:
    """The rows of one split, over all languages.

    Args:
        keys: uint64 (languages, n), equal where two premises are the same normalised text (`premise_keys`).
        usable: bool (n,), False where some language has no text.
    """

    keys: Keys
    usable: npt.NDArray[np.bool_]


def premise_keys(texts: Iterable[str]) -> Keys:
    """A 64-bit hash of each text's normalised form, (n,)."""
    known: dict[str, int] = {}
    for text in (texts := list(texts)):
        if text not in known:
            digest = hashlib.blake2b(normalise(text).encode(), digest_size=8).digest()
            known[text] = int.from_bytes(digest, "little")
    return np.array([known[text] for text in texts], dtype=np.uint64)


def places(splits: Mapping[Split, Rows], wanted: Mapping[Split, int], seed: int) -> dict[tuple[Pool, Split], Ints]:
    """Row numbers of each pool and split, in seeded order.

    Places are filled one after another, train before test and seen before unseen, with whole groups in a seeded
    order; what is left of the last group when the place is full is not used, nor is a row that lacks a text.

    Args:
        splits: all rows.
        wanted: rows of each pool; half of the usable rows where there are fewer than twice as many.
        seed: run seed.

    Returns:
        (pool, split) -> (n,) int64; fewer than wanted where test premises are used up by train rows.
    """
    groups = dict(zip(SPLITS, _groups([splits[split].keys for split in SPLITS]), strict=True))
    taken: set[int] = set()
    result: dict[tuple[Pool, Split], Ints] = {}
    for split in SPLITS:
        members = _members(groups[split], splits[split].usable, seed, split)
        target = min(wanted[split], int(splits[split].usable.sum()) // 2)
        for pool in POOLS:
            rows = _fill(members, target, taken)
            result[pool, split] = numpy_rng(seed, "parallel", pool, split).permutation(rows)
    return result


def _groups(keys: Sequence[Keys]) -> list[Ints]:
    """The group number of each row, (n,) per split: connected components of rows and premises."""
    sizes = [k.shape[1] for k in keys]
    every = np.concatenate(keys, axis=1)
    unique, premise = np.unique(every, return_inverse=True)
    rows = np.tile(np.arange(every.shape[1]), every.shape[0])
    links = (np.ones(len(rows), dtype=np.bool_), (rows, premise.ravel() + every.shape[1]))
    nodes = every.shape[1] + len(unique)
    _, group = connected_components(coo_array(links, shape=(nodes, nodes)), directed=False)
    return [part.astype(np.int64) for part in np.split(group[: sum(sizes)], np.cumsum(sizes)[:-1])]


def _members(group: Ints, usable: npt.NDArray[np.bool_], seed: int, split: Split) -> list[tuple[int, Ints]]:
    """(group, its usable rows), ordered by a draw for the group's first row.

    A draw per row number, not a permutation of the groups: a language that links two groups more moves only these.
    """
    draws = numpy_rng(seed, "parallel", split).random(len(group))
    names, first, inverse = np.unique(group, return_index=True, return_inverse=True)
    order = np.argsort(inverse, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(inverse))[:-1]) if len(group) else []
    return [(int(names[i]), rows[i][usable[rows[i]]]) for i in np.argsort(draws[first], kind="stable")]


def _fill(members: Sequence[tuple[int, Ints]], target: int, taken: set[int]) -> Ints:
    """Rows of the first groups that are not taken, (at most target,); marks them as taken."""
    pieces: list[Ints] = [np.empty(0, dtype=np.int64)]
    room = target
    for name, rows in members:
        if not room:
            break
        if name not in taken and len(rows):
            taken.add(name)
            pieces.append(rows[:room])
            room -= len(pieces[-1])
    return np.concatenate(pieces)
