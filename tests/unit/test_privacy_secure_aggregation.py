"""Simulated secure aggregation: masks cancel exactly, numbers are off by a step at most, drop-outs and bytes count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedtailor.aggregation.weighted_mean import WeightedMean, WeightedSum
from fedtailor.core.errors import ConfigError, RoundError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.privacy import privacy_lines
from fedtailor.federated.release import RoundId
from fedtailor.privacy.config import PrivacyConfig, SecAggConfig
from fedtailor.privacy.secure_aggregation import (
    KEY,
    SHARE,
    Bits,
    PairwiseMasking,
    RingSum,
    degree,
    from_ring,
    graph,
    to_fixed_point,
    traffic,
)

STEP = 2.0**-12
COHORT = tuple(f"seen/xx/{i:02d}" for i in range(9))
ROUND_ID = RoundId(42, "base/seed42", 1, COHORT)
SIZE = 60


def masking(
    bits: Bits = 64, complete: bool = True, dropout: float = 0.0, uniform: bool = False, **how: float
) -> PairwiseMasking:
    limit, threshold = how.get("limit", 8.0), how.get("threshold", 0.5)
    secagg = SecAggConfig(step=STEP, range=limit, modulus_bits=bits, threshold=threshold, dropout=dropout)
    cfg = PrivacyConfig(secure_aggregation="secagg" if complete else "secagg+", secagg=secagg)
    return PairwiseMasking(cfg, uniform)


def encode(update: np.ndarray) -> np.ndarray:
    return to_fixed_point(update, STEP, 8.0)[0]


def population(seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, float]]:
    rng = np.random.default_rng(seed)
    received = rng.standard_normal(SIZE).astype(np.float32)
    rows = {c: (received + 0.1 * rng.standard_normal(SIZE)).astype(np.float32) for c in COHORT}
    return received, rows, {c: float(rng.integers(5, 200)) for c in COHORT}


def round_of(protocol: PairwiseMasking, lost: tuple[str, ...] = ()) -> tuple[WeightedSum, list[str]]:
    """A whole round, in two segments; ``lost`` are clients that break after they agreed on masks."""
    received, rows, weights = population()
    aggregator, total, valid = RingSum(bits=protocol.cfg.secagg.modulus_bits), None, []
    for segment in (COHORT[:4], COHORT[4:]):
        part = aggregator.zero(SIZE)
        for client in segment:
            sent = protocol.mask(rows[client], received, weights[client], client, ROUND_ID)
            if sent.vector is not None and client not in lost:
                part = aggregator.add(part, sent.vector, weights[client])
                valid.append(client)
        total = part if total is None else aggregator.merge(total, part)
    assert total is not None
    return total, valid


def plain_mean(valid: list[str], uniform: bool = False) -> np.ndarray:
    _, rows, weights = population()
    mean, state = WeightedMean(uniform=uniform), WeightedMean().zero(SIZE)
    for client in valid:
        state = mean.add(state, rows[client], weights[client])
    return state.total / state.weight


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("complete", [True, False])
def test_masks_cancel_exactly_in_the_ring(bits: Bits, complete: bool) -> None:
    protocol = masking(bits, complete)
    received, rows, weights = population()
    total, valid = round_of(protocol)
    opened = protocol.open(total, received, valid, ROUND_ID)
    whole = sum(encode(rows[c].astype(np.float64) - received) * int(weights[c]) for c in COHORT)
    np.testing.assert_array_equal(np.rint((opened.total.total - opened.total.weight * received) / STEP), whole)
    assert opened.total.weight == sum(weights.values())


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("uniform", [True, False])
def test_the_mean_is_the_plain_one_up_to_half_a_step(bits: Bits, complete: bool, uniform: bool) -> None:
    protocol = masking(bits, complete, uniform=uniform)
    total, valid = round_of(protocol)
    opened = protocol.open(total, population()[0], valid, ROUND_ID)
    found = opened.total.total / opened.total.weight
    assert np.abs(found - plain_mean(valid, uniform)).max() <= STEP / 2 * (1 + 1e-9)


def test_a_finer_step_is_nearer_by_as_much() -> None:
    received, rows, _ = population()
    errors = []
    for step in (2.0**-8, 2.0**-16):
        update = rows[COHORT[0]].astype(np.float64) - received
        errors.append(np.abs(to_fixed_point(update, step, 8.0)[0] * step - update).max())
    assert errors[0] / errors[1] == pytest.approx(256, rel=0.2)


def test_rounding_toward_zero_never_makes_an_update_longer() -> None:
    update = np.random.default_rng(1).standard_normal(500)
    cut = to_fixed_point(update, 0.01, 8.0, toward_zero=True)[0] * 0.01
    nearest = to_fixed_point(update, 0.01, 8.0)[0] * 0.01
    assert (np.abs(cut) <= np.abs(update) + 1e-12).all()
    assert (np.abs(nearest) > np.abs(update)).any()


def test_numbers_beyond_the_range_are_cut_and_counted() -> None:
    whole, cut = to_fixed_point(np.array([-9.0, 1.9, 2.0, 3.0]), 0.5, 2.0)
    assert [int(x) for x in whole] == [-4, 4, 4, 4]
    assert cut == 2


def test_what_a_client_sends_looks_like_noise_and_is_not_its_update() -> None:
    received, rows, weights = population()
    protocol, client = masking(32), COHORT[0]
    sent = protocol.mask(rows[client], received, weights[client], client, ROUND_ID).vector
    later = RoundId(42, "base/seed42", 2, COHORT)
    again = protocol.mask(rows[client], received, weights[client], client, later).vector
    assert sent is not None
    assert again is not None
    assert (sent != again).mean() > 0.95
    assert np.abs(from_ring(sent)).mean() == pytest.approx(2**30, rel=0.5)


@pytest.mark.parametrize("complete", [True, False])
def test_clients_that_vanish_after_masking_are_taken_out_of_the_sum(complete: bool) -> None:
    protocol = masking(complete=complete, dropout=0.25)
    total, valid = round_of(protocol)
    assert len(valid) == 7
    opened = protocol.open(total, population()[0], valid, ROUND_ID)
    assert np.abs(opened.total.total / opened.total.weight - plain_mean(valid)).max() <= STEP / 2 * (1 + 1e-9)
    assert opened.metrics["secagg_vanished"] == 2


def test_a_client_that_breaks_is_recovered_like_one_that_vanished() -> None:
    protocol = masking()
    total, valid = round_of(protocol, lost=COHORT[2:4])
    opened = protocol.open(total, population()[0], valid, ROUND_ID)
    assert np.abs(opened.total.total / opened.total.weight - plain_mean(valid)).max() <= STEP / 2 * (1 + 1e-9)


@pytest.mark.parametrize(("lost", "fails"), [(3, False), (4, True), (6, True)])
def test_a_round_stands_while_every_client_has_more_than_half_of_its_neighbours(lost: int, fails: bool) -> None:
    protocol = masking()
    total, valid = round_of(protocol, lost=COHORT[:lost])
    if fails:
        # 9 clients, 8 neighbours each, 5 needed: of 5 survivors each has 4 others left.
        with pytest.raises(RoundError, match=r"of its 8 neighbours are left and 5 are needed"):
            protocol.open(total, population()[0], valid, ROUND_ID)
    else:
        assert protocol.open(total, population()[0], valid, ROUND_ID).total.weight > 0


def test_a_sum_that_may_wrap_is_refused() -> None:
    received, rows, weights = population()
    protocol = masking(32, limit=2.0**11)  # 2^23 steps times a weight in the hundreds
    aggregator = RingSum(bits=32)
    total = aggregator.zero(SIZE)
    for client in COHORT:
        vector = protocol.mask(rows[client], received, weights[client], client, ROUND_ID).vector
        total = aggregator.add(total, vector, 1.0)
    with pytest.raises(RoundError, match="may wrap at 2\\^32"):
        protocol.open(total, received, list(COHORT), ROUND_ID)


def test_everybody_loses_the_same_clients_whatever_the_method() -> None:
    protocol = masking(dropout=0.3)
    one = protocol.vanishing(RoundId(1, "strategy/fedp2eft/seed1", 4, COHORT))
    assert one == protocol.vanishing(RoundId(1, "strategy/fedl2p/seed1", 4, COHORT))
    rounds = {protocol.vanishing(RoundId(1, "strategy/fedp2eft/seed1", r, COHORT)) for r in range(20)}
    assert {len(gone) for gone in rounds} == {3}
    assert len(rounds) > 10


@pytest.mark.parametrize(("count", "k"), [(9, 4), (16, 6), (20, 20), (3, 2)])
def test_neighbours_are_mutual_and_as_many_as_asked_for(count: int, k: int) -> None:
    cohort = tuple(f"c{i}" for i in range(count))
    links = graph(cohort, degree(count, k, complete=False), 1, "base", 0)
    for client, others in links.items():
        assert client not in others
        assert len(set(others)) == len(others) == min(k, count - 1)
        assert all(client in links[other] for other in others)


def test_bytes_are_the_formula_of_the_papers_and_grow_with_neighbours_only() -> None:
    n, m = 128, 1000
    full, sparse = traffic(m, n - 1, 32), traffic(m, 14, 32)
    assert full.up + full.down == 2 * n * KEY + (5 * n - 4) * SHARE + m * 4
    # SecAgg+: 2 (k + 1) a_K + (5 k + 1) a_S, since one has k others in the place of n - 1.
    assert sparse.up + sparse.down == 2 * 15 * KEY + (5 * 14 + 1) * SHARE + m * 4
    assert traffic(m, 14, 64).up - sparse.up == m * 4
    assert traffic(m, 14, 32, vanished=True).up == sparse.up - m * 4 - 15 * SHARE


def test_the_bytes_of_a_round_count_the_weight_and_the_vanished() -> None:
    protocol = masking(32, dropout=0.25)
    total, valid = round_of(protocol)
    told = protocol.open(total, population()[0], valid, ROUND_ID).metrics
    stayed, gone = traffic(SIZE + 1, 8, 32).up, traffic(SIZE + 1, 8, 32, vanished=True).up
    assert math.isclose(told["secagg_up_bytes"], (7 * stayed + 2 * gone) / 9)


MASKED = "privacy.secure_aggregation=secagg+"
NOISY = ("privacy=central_dp", "privacy.clip=1", "privacy.noise_multiplier=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((MASKED, "aggregation=krum"), r"compares single updates.*\(allowed: method, norm_bound\)"),
        ((MASKED, "aggregation=krum", *NOISY), r"compares single updates.*\(allowed: method\)"),
        ((MASKED, "aggregation=trimmed_mean"), "compares single updates"),
        ((MASKED, "base.cohort=2"), "fewer than 3"),
        ((MASKED, "privacy.secagg.neighbours=16"), "has 15 others"),
        (("privacy.secure_aggregation=secagg", "privacy.secagg.neighbours=4"), "for secagg\\+"),
        (("privacy.secagg.dropout=0.1",), "would do nothing"),
        ((MASKED, "privacy.secagg.modulus_bits=32", "privacy.secagg.range=1e6"), "does not fit"),
        ((MASKED, *NOISY, "privacy.sampler=poisson"), "known size"),
    ],
)
def test_what_masks_would_make_impossible_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose([], list(overrides))


def test_a_bound_on_norms_is_each_clients_own_and_goes_with_masks() -> None:
    exp = compose([], [MASKED, "aggregation=norm_bound", "aggregation.bound=1"])
    text = "\n".join(privacy_lines(exp, 160))
    assert "protects nobody" in text
    assert "norm alarm" in text
