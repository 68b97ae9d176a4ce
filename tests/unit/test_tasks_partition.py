from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from fedtailor.core.errors import DataError
from fedtailor.tasks.partition import Shard, _draw_classes, client_id, partition, resample
from fedtailor.tasks.source import Example, LanguagePool


def pool(train: Sequence[int], test: Sequence[int]) -> LanguagePool:
    """A pool with train[c] train texts and test[c] test texts of class c."""

    def split(name: str, counts: Sequence[int]) -> list[Example]:
        return [Example(f"{name} {c} {i}", c) for c, n in enumerate(counts) for i in range(n)]

    return LanguagePool(split("train", train), split("test", test))


def deal(part: LanguagePool, clients: int, alpha: float = 0.5, seed: int = 42, where: str = "seen") -> list[Shard]:
    return list(partition(part, where, "amh", clients, alpha, seed))  # type: ignore[arg-type]


def shares(part: LanguagePool, shards: Sequence[Shard], split: str, classes: int) -> np.ndarray:
    labels = np.array([e.label for e in part.split(split)])  # type: ignore[arg-type]
    counts = np.stack([np.bincount(labels[getattr(s, split)], minlength=classes) for s in shards])
    return counts / counts.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(("train", "clients"), [((50, 30, 21), 10), ((7, 0, 40), 4), ((3, 3, 3), 4), ((100,), 7)])
def test_shard_sizes_differ_by_at_most_one(train: tuple[int, ...], clients: int) -> None:
    shards = deal(pool(train, train), clients)
    for sizes in ([len(s.train) for s in shards], [len(s.test) for s in shards]):
        assert len(sizes) == clients
        assert max(sizes) - min(sizes) <= 1


def test_every_train_and_test_text_is_used_exactly_once() -> None:
    part = pool((50, 30, 21), (20, 10, 7))
    shards = deal(part, 10)
    assert sorted(np.concatenate([s.train for s in shards])) == list(range(len(part.train)))
    assert sorted(np.concatenate([s.test for s in shards])) == list(range(len(part.test)))


def test_test_texts_of_a_class_without_train_texts_belong_to_nobody() -> None:
    part = pool((50, 0, 20), (20, 9, 7))
    used = np.concatenate([s.test for s in deal(part, 5)])
    assert sorted(part.test[i].label for i in used) == [0] * 20 + [2] * 7


def test_a_class_that_the_test_part_lacks_is_legal() -> None:
    shards = deal(pool((50, 30), (20, 0)), 10)
    assert all(len(s.test) == 2 for s in shards)


def test_test_class_shares_follow_the_same_clients_train_shares() -> None:
    part = pool((400,) * 5, (400,) * 5)
    shards = deal(part, 10)
    train, test = (shares(part, shards, split, 5) for split in ("train", "test"))
    distance = np.abs(train[:, None] - test[None]).sum(-1) / 2
    own = np.diag(distance)
    others = (distance.sum(axis=1) - own) / 9
    assert own.mean() < 0.5 * others.mean()
    # Two clients of 200 texts cannot run a class of 400 out: only sampling noise separates train and test.
    assert own[:2].max() < 0.2


def test_small_alpha_is_skewed_and_large_alpha_is_even() -> None:
    part = pool((400,) * 5, (400,) * 5)
    top = [shares(part, deal(part, 10, alpha), "train", 5).max(axis=1).mean() for alpha in (0.1, 0.5, 1000.0)]
    assert top[0] > top[1] > top[2]
    assert top[2] < 0.3


def test_equal_seeds_give_equal_shards_and_other_seeds_or_pools_do_not() -> None:
    part = pool((50, 30, 21), (20, 10, 7))

    def flat(shards: list[Shard]) -> list[int]:
        return [int(i) for s in shards for rows in (s.train, s.test) for i in rows]

    assert flat(deal(part, 5)) == flat(deal(part, 5))
    assert flat(deal(part, 5)) != flat(deal(part, 5, seed=43))
    assert flat(deal(part, 5)) != flat(deal(part, 5, where="unseen"))


def test_block_draws_equal_one_draw_at_a_time() -> None:
    """The vectorised draw against the definition: an emptied class gets 0, the others 1e-5 more."""
    rng = np.random.default_rng(0)
    emptied = 0
    for _ in range(200):
        prior, left = rng.dirichlet(np.full(4, 0.5)), rng.integers(0, 6, size=4)
        uniforms = rng.random(int(left.sum()))
        stock, expected = left.copy(), []
        for u in uniforms:
            p = prior if (stock > 0).all() else np.where(stock > 0, prior + 1e-5, 0.0)
            c = int(np.flatnonzero(np.cumsum(p / p.sum()) > u)[0])
            stock[c] -= 1
            expected.append(c)
        emptied += int((left > 0).sum())
        assert _draw_classes(prior, left, uniforms).tolist() == expected
        assert left.tolist() == [0, 0, 0, 0]
    assert emptied > 400


def test_a_client_whose_only_class_ran_out_gets_the_others() -> None:
    left = np.array([0, 3])
    assert _draw_classes(np.array([1.0, 0.0]), left, np.array([0.0, 0.5, 1 - 1e-16])).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("train", "test", "clients", "message"),
    [
        ((3, 2), (9, 9), 10, r"client seen/amh/05 would be empty.*'amh' has 5 train.*at most 2 would fit"),
        ((9, 6), (9, 9), 10, r"client seen/amh/05 would have 1 train text and needs 2.*at most 7 would fit"),
        ((30, 30), (3, 4), 10, r"client seen/amh/07 would be empty.*7 usable test.*at most 7 would fit"),
        ((30, 0), (3, 40), 10, r"client seen/amh/03 would be empty.*3 usable test.*at most 3 would fit"),
        ((0, 0), (0, 0), 1, r"client seen/amh/00 would be empty.*at most 0 would fit"),
    ],
)
def test_too_few_texts_name_the_client_and_how_many_would_fit(
    train: tuple[int, ...], test: tuple[int, ...], clients: int, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        deal(pool(train, test), clients)


def test_ids_sort_by_number() -> None:
    assert client_id("seen", "amh", 7, 10) == "seen/amh/07"
    assert client_id("seen", "amh", 7, 625) == "seen/amh/007"
    ids = [client_id("seen", "amh", i, 1001) for i in range(1001)]
    assert ids == sorted(ids)


def redraw(part: LanguagePool, clients: int, n: int = 40, alpha: float = 0.5) -> list[Shard]:
    return list(resample(part, "seen", "amh", clients, alpha, n, 42))


def test_resampled_clients_have_n_train_and_a_third_plus_one_test_texts() -> None:
    shards = redraw(pool((5, 3), (2, 1)), clients=50, n=40)
    assert {(len(s.train), len(s.test)) for s in shards} == {(40, 14)}
    assert max(int(s.train.max()) for s in shards) == 7
    assert max(int(s.test.max()) for s in shards) == 2


def test_resampled_classes_follow_the_clients_prior_in_train_and_test() -> None:
    part = pool((50,) * 4, (10,) * 4)
    shards = redraw(part, clients=30, n=600)
    train, test = (shares(part, shards, split, 4) for split in ("train", "test"))
    assert np.abs(train - test).sum(axis=1).mean() / 2 < 0.06
    assert train.max(axis=1).mean() > 0.5


def test_a_resampled_client_does_not_depend_on_the_number_of_clients() -> None:
    part = pool((50, 30), (20, 10))
    few, many = redraw(part, 3), redraw(part, 300)
    assert all((a.train == b.train).all() and (a.test == b.test).all() for a, b in zip(few, many, strict=False))


@pytest.mark.parametrize(
    ("train", "test", "n"), [((5, 0), (0, 5), 10), ((0,), (5,), 10), ((5,), (0,), 10), ((5,), (5,), 1)]
)
def test_resampling_from_nothing_or_one_text_is_an_error(train: tuple[int, ...], test: tuple[int, ...], n: int) -> None:
    with pytest.raises(DataError, match=r"client seen/amh/00 would be empty|task\.resample"):
        redraw(pool(train, test), clients=2, n=n)
