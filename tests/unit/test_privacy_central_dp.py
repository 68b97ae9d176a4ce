"""Central differential privacy: what is clipped, added, divided by and counted."""

from __future__ import annotations

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant

from fedtailor.aggregation.weighted_mean import WeightedMean, WeightedSum
from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import seen_clients
from fedtailor.experiment.privacy import forecast, mechanism, privacy_lines
from fedtailor.federated.release import RoundId, still
from fedtailor.federated.rounds import RoundPlan, cohort_of
from fedtailor.federated.updates import clip_update
from fedtailor.privacy.accounting import ORDERS, Mechanism, Spent, default_delta, epsilon, noise_for
from fedtailor.privacy.central_dp import GaussianMechanism
from fedtailor.storage.files import Storage
from fedtailor.storage.journal import LEDGER, PrivacyLedger

ROUND_ID = RoundId(42, "strategy/fedp2eft/seed42", 3)
RNG = np.random.default_rng(0)
MEAN = WeightedMean(uniform=True)


def summed(rows: list[np.ndarray]) -> WeightedSum:
    state = MEAN.zero(rows[0].size)
    for row in rows:
        state = MEAN.add(state, row, 7.0)
    return state


def clients(count: int, size: int, received: np.ndarray, length: float) -> list[np.ndarray]:
    return [(received + length * RNG.standard_normal(size)).astype(np.float32) for _ in range(count)]


# --- release


def test_without_noise_and_clip_the_release_is_the_uniform_mean_to_the_last_bit() -> None:
    received = RNG.standard_normal(999).astype(np.float32)
    total = summed(clients(7, 999, received, 0.3))
    released = GaussianMechanism(np.inf, 0.0)(total, received, 7, ROUND_ID, 0)
    assert released.consensus.tobytes() == MEAN.result(total).tobytes()


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e3])
@pytest.mark.parametrize("clip", [1e-7, 1e-3, 0.1, 30.0])
def test_rounding_to_float32_never_makes_a_clipped_update_longer_than_the_clip(clip: float, scale: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        received = (scale * rng.standard_normal(501)).astype(np.float32)
        row = (received + 2 * rng.standard_normal(501)).astype(np.float32)
        cut, norm = clip_update(row, received, clip)
        assert norm > clip
        assert cut.dtype == np.float32
        assert np.linalg.norm(cut.astype(np.float64) - received.astype(np.float64)) <= clip


def test_a_clipped_update_keeps_its_direction_and_its_length() -> None:
    received = np.zeros(100, np.float32)
    row = RNG.standard_normal(100).astype(np.float32)
    cut, _ = clip_update(row, received, 0.25)
    assert np.linalg.norm(cut) == pytest.approx(0.25, rel=1e-6)
    np.testing.assert_allclose(cut / 0.25, row / np.linalg.norm(row), rtol=1e-5)


def test_one_replaced_client_moves_the_sum_by_at_most_two_clips_and_an_absent_one_by_one() -> None:
    clip, size, planned = 0.5, 200, 6
    received = RNG.standard_normal(size).astype(np.float32)
    others = [clip_update(row, received, clip)[0] for row in clients(planned - 1, size, received, 1.0)]
    direction = RNG.standard_normal(size)
    extreme = [
        clip_update((received + sign * 1e4 * direction).astype(np.float32), received, clip)[0] for sign in (1, -1)
    ]  # the worst pair: opposite updates, both cut to the clip
    mechanism = GaussianMechanism(clip, 0.0)
    one, two = (mechanism(summed([*others, row]), received, planned, ROUND_ID, 0).consensus for row in extreme)
    gone = mechanism(summed(others), received, planned, ROUND_ID, 0).consensus
    rounding = 1e-6 * planned * np.sqrt(size)
    assert planned * np.linalg.norm(one.astype(float) - two) == pytest.approx(2 * clip, abs=rounding)
    assert planned * np.linalg.norm(one.astype(float) - gone) == pytest.approx(clip, abs=rounding)


def test_the_denominator_is_the_planned_cohort_whoever_succeeds() -> None:
    received = np.ones(3, np.float32)
    row = np.array([1.0, 2.0, 3.0], np.float32)
    released = GaussianMechanism(np.inf, 0.0)(summed([row]), received, 4, ROUND_ID, 0)
    np.testing.assert_allclose(released.consensus, [1.0, 1.25, 1.5])
    nobody = GaussianMechanism(1.0, 0.0)(None, received, 4, ROUND_ID, 0)
    np.testing.assert_array_equal(nobody.consensus, received)


def test_the_noise_on_the_sum_has_the_promised_deviation_and_no_mean() -> None:
    clip, multiplier, planned, size = 0.3, 1.7, 10, 40_000
    mechanism = GaussianMechanism(clip, multiplier)
    zero = np.zeros(size, np.float32)
    noise = planned * mechanism(summed([zero] * planned), zero, planned, ROUND_ID, 0).consensus.astype(np.float64)
    expected = multiplier * clip
    assert noise.std() == pytest.approx(expected, rel=5 / np.sqrt(2 * size))
    assert abs(noise.mean()) < 5 * expected / np.sqrt(size)
    # Gaussian, not merely of that variance: the fourth moment is 3 sigma^4.
    assert (noise**4).mean() / expected**4 == pytest.approx(3, rel=5 * np.sqrt(96 / 9 / size))


def test_a_round_draws_the_same_noise_again_and_no_two_releases_share_it() -> None:
    mechanism = GaussianMechanism(1.0, 1.0)
    again = mechanism.noise(50, ROUND_ID, 0)
    np.testing.assert_array_equal(mechanism.noise(50, ROUND_ID, 0), again)
    others = [
        (RoundId(42, "strategy/fedp2eft/seed42", 4), 0),
        (RoundId(43, "strategy/fedp2eft/seed42", 3), 0),
        (RoundId(42, "strategy/fedl2p/r2/seed42", 3), 0),
        (RoundId(42, "base/seed42", 3), 0),
        (ROUND_ID, 1),
    ]
    for round_id, draw in others:
        assert not np.intersect1d(mechanism.noise(50, round_id, draw), again).size


def test_an_update_under_its_noise_is_told() -> None:
    received = np.zeros(1000, np.float32)
    rows = [np.full(1000, 0.01, np.float32)] * 4
    loud = GaussianMechanism(0.5, 1.0)(summed(rows), received, 4, ROUND_ID, 0)
    quiet = GaussianMechanism(0.5, 1e-4)(summed(rows), received, 4, ROUND_ID, 0)
    assert [warning["kind"] for warning in loud.warnings] == ["mostly-noise"]
    assert not quiet.warnings
    assert loud.metrics["noise_to_update"] == pytest.approx(
        loud.metrics["noise_norm"] / loud.metrics["update_norm"], rel=1e-9
    )


def test_parameters_that_did_not_move_are_told() -> None:
    before = np.ones(5, np.float32)
    assert [warning["kind"] for warning in still(before, before.copy())] == ["unmoved"]
    assert not still(before, np.nextafter(before, np.float32(2)))
    # A clip far below float32's grain cuts every update to nothing.
    cut, _ = clip_update(before + 1, before, 1e-12)
    assert still(before, GaussianMechanism(1e-12, 0.0)(summed([cut]), before, 1, ROUND_ID, 0).consensus)


# --- accounting


def accountant(relation: str, orders: tuple[float, ...] | None = ORDERS) -> RdpAccountant:
    return RdpAccountant(orders, neighboring_relation=dp_accounting.NeighboringRelation[relation])


def test_epsilon_of_fixed_cohorts_is_that_of_dp_accounting_with_twice_the_clip_as_sensitivity() -> None:
    delta = default_delta(160)
    event = dp_accounting.SampledWithoutReplacementDpEvent(160, 16, dp_accounting.GaussianDpEvent(2.0 / 2))
    expected = accountant("REPLACE_ONE").compose(event, 20).get_epsilon(delta)
    found = epsilon(Mechanism(2.0, 0.1, delta, "fixed", 160), (Spent("base", 16, (1,) * 20),))
    assert found == pytest.approx(expected, rel=1e-12)


def test_epsilon_of_poisson_cohorts_is_that_of_dp_accounting_with_the_clip_as_sensitivity() -> None:
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(1.0))
    expected = accountant("ADD_OR_REMOVE_ONE").compose(event, 20).get_epsilon(1e-3)
    found = epsilon(Mechanism(1.0, 0.1, 1e-3, "poisson", 160), (Spent("base", 16, (1,) * 20),))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("sampler", "share"), [("fixed", 2.0), ("poisson", 1.0)])
def test_a_cohort_of_everybody_is_the_plain_gaussian_mechanism(sampler: str, share: float) -> None:
    event = dp_accounting.GaussianDpEvent(3.0 / share)
    relation = "REPLACE_ONE" if sampler == "fixed" else "ADD_OR_REMOVE_ONE"
    expected = accountant(relation).compose(event, 5).get_epsilon(1e-3)
    found = epsilon(Mechanism(3.0, 1.0, 1e-3, sampler, 12), (Spent("base", 12, (1,) * 5),))  # type: ignore[arg-type]
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("noise", [0.7, 2.0, 12.0, 60.0])
@pytest.mark.parametrize("sampler", ["fixed", "poisson"])
def test_few_renyi_orders_lose_less_than_a_percent(sampler: str, noise: float) -> None:
    fixed = sampler == "fixed"
    gauss = dp_accounting.GaussianDpEvent(noise / (2 if fixed else 1))
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(500, 20, gauss)
    event = sampled if fixed else dp_accounting.PoissonSampledDpEvent(20 / 500, gauss)
    relation = "REPLACE_ONE" if fixed else "ADD_OR_REMOVE_ONE"
    best = accountant(relation, orders=None).compose(event, 30).get_epsilon(1e-4)
    found = epsilon(Mechanism(noise, 1.0, 1e-4, sampler, 500), (Spent("base", 20, (1,) * 30),))  # type: ignore[arg-type]
    assert 0.99 * best < found < 1.01 * best


def test_base_and_strategy_are_composed_and_strategies_on_one_cohort_share_its_sample() -> None:
    terms = Mechanism(4.0, 1.0, 1e-3, "fixed", 40)
    base, strategy = Spent("base", 8, (1, 1)), Spent("strategy", 8, (1, 1))
    sampled = dp_accounting.SampledWithoutReplacementDpEvent
    gauss = dp_accounting.GaussianDpEvent(2.0)
    once = accountant("REPLACE_ONE").compose(sampled(40, 8, gauss), 4).get_epsilon(1e-3)
    assert epsilon(terms, (base, strategy)) == pytest.approx(once, rel=1e-12)
    # Two outputs of one sample: amplified once, with the noise of both together, not as four samples.
    pair = dp_accounting.SelfComposedDpEvent(gauss, 2)
    joint = accountant("REPLACE_ONE").compose(sampled(40, 8, pair), 2).get_epsilon(1e-3)
    assert epsilon(terms, (strategy, strategy)) == pytest.approx(joint, rel=1e-12)
    assert joint != pytest.approx(once, rel=1e-3)


def test_without_noise_or_clip_epsilon_is_infinite_and_without_rounds_zero() -> None:
    rounds = (Spent("base", 4, (1, 1)),)
    assert epsilon(Mechanism(0.0, 1.0, 1e-3, "fixed", 8), rounds) == np.inf
    assert epsilon(Mechanism(1.0, None, 1e-3, "fixed", 8), rounds) == np.inf
    assert epsilon(Mechanism(1.0, 1.0, 1e-3, "fixed", 8), ()) == 0.0


def test_the_noise_for_a_target_meets_it_and_a_little_less_does_not() -> None:
    terms, rounds = Mechanism(1.0, 1.0, 1e-2, "poisson", 100), (Spent("base", 10, (1,) * 10),)
    noise = noise_for(3.0, terms, rounds)
    assert epsilon(Mechanism(noise, 1.0, 1e-2, "poisson", 100), rounds) <= 3.0
    assert epsilon(Mechanism(noise - 0.005, 1.0, 1e-2, "poisson", 100), rounds) > 3.0


def test_poisson_cohorts_vary_and_take_every_client_at_the_planned_rate() -> None:
    names = tuple(f"c{i:03d}" for i in range(200))
    plan = RoundPlan("base/seed1", 1, 400, names, dict.fromkeys(names, 1), 20, 8, 4, poisson=True)
    cohorts = [cohort_of(plan, round) for round in range(400)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    assert sizes.std() == pytest.approx(np.sqrt(200 * 0.1 * 0.9), rel=0.2)
    assert sizes.mean() == pytest.approx(20, abs=5 * np.sqrt(18 / 400))
    assert cohorts == [cohort_of(plan, round) for round in range(400)]


# --- ledger

TERMS = Mechanism(2.0, 1.0, 1e-2, "fixed", 20)


def ledger(storage: Storage, before: tuple[Spent, ...] = ()) -> PrivacyLedger:
    return PrivacyLedger(storage, "artifacts/base-1", TERMS, "base/seed1", 5, before)


def test_a_round_is_written_down_before_it_is_released_and_its_spend_never_falls(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    spent = [ledger(storage).record_spend(round, f"sum{round}").epsilon for round in range(3)]
    assert spent == [entry["epsilon"] for entry in ledger(storage).entries()]
    assert spent == sorted(spent)
    assert spent[-1] == epsilon(TERMS, (Spent("base/seed1", 5, (1, 1, 1)),))


def test_a_round_that_is_run_again_costs_nothing_more_if_its_sum_is_the_same(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    first = ledger(storage).record_spend(0, "sum")
    assert ledger(storage).record_spend(0, "sum") == first
    assert len(ledger(storage).entries()) == 1


def test_another_sum_of_the_same_round_gets_noise_of_its_own_and_is_counted(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    first, second = ledger(storage).record_spend(0, "sum"), ledger(storage).record_spend(0, "other")
    assert (first.number, second.number) == (0, 1)
    assert second.epsilon > first.epsilon
    assert ledger(storage).spent().releases == (2,)


def test_what_the_base_spent_counts_for_the_strategy(tmp_path) -> None:
    storage, base = Storage(str(tmp_path)), Spent("base/seed1", 5, (1, 2, 1))
    assert ledger(storage, (base,)).record_spend(0, "sum").epsilon > epsilon(TERMS, (base,))


def test_a_torn_line_was_never_relied_on_and_a_cut_ledger_is_refused(tmp_path) -> None:
    storage, path = Storage(str(tmp_path)), tmp_path / "artifacts/base-1" / LEDGER
    for round in range(3):
        ledger(storage).record_spend(round, f"sum{round}")
    whole = path.read_text()
    path.write_text(whole[:-20])
    ledger(storage).record_spend(2, "sum2")
    assert path.read_text() == whole
    path.write_text(whole.split("\n", 1)[1])
    with pytest.raises(StorageError, match="lacks round 0"):
        ledger(storage).record_spend(3, "sum3")
    path.write_text(whole.replace('{"round": 1', '{"rou'))
    with pytest.raises(StorageError, match="damaged"):
        ledger(storage).record_spend(3, "sum3")


# --- configuration

DP = ("privacy=central_dp", "privacy.clip=0.1")
ONE = (*DP, "privacy.noise_multiplier=1")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("privacy.clip=1",), "'privacy.clip' without privacy=central_dp"),
        (("privacy=central_dp", "privacy.noise_multiplier=1"), "needs 'privacy.clip'"),
        (DP, "needs one of"),
        ((*ONE, "privacy.target_epsilon=3"), "needs one of"),
        ((*ONE, "aggregation=median"), "'aggregation' = median"),
        ((*ONE, "aggregation=krum"), "'aggregation' = krum"),
        ((*ONE, "aggregation=norm_bound", "aggregation.bound=1"), "set 'privacy.clip'"),
        ((*ONE, "methods=[fedl2p]"), "fedl2p.patience=null"),
        ((*ONE, "strategy.cohort=1"), "'strategy.cohort' is 1 client"),
        ((*DP, "privacy.target_epsilon=3", "methods=[lora]", "base=none"), "no stage of this run has rounds"),
    ],
)
def test_what_would_not_be_private_is_refused(overrides: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compose([], list(overrides))


def test_a_method_that_could_stop_early_is_taken_when_it_does_not() -> None:
    assert compose([], [*ONE, "methods=[fedl2p]", "fedl2p.patience=null"]).privacy.clip == 0.1


def test_the_forecast_gives_every_method_its_pipeline_and_counts_a_strategy_per_budget() -> None:
    few = ("base.rounds=2", "strategy.rounds=2", "budgets=[2,4]", "fedl2p.patience=null")
    exp = compose([], [*ONE, *few, "methods=[lora,fedp2eft,fedl2p]"])
    found = forecast(exp, 160)
    assert found is not None
    base, one = Spent("base", 16, (1, 1)), Spent("strategy", 16, (1, 1))
    assert found.by_method["lora"] == epsilon(found.mechanism, (base,))
    assert found.by_method["fedp2eft"] == epsilon(found.mechanism, (base, one))
    assert found.by_method["fedl2p"] == epsilon(found.mechanism, (base, one, one))
    assert found.together == epsilon(found.mechanism, (base, one, one, one))


def test_a_target_epsilon_is_met_by_the_dearest_method() -> None:
    exp = compose([], [*DP, "privacy.target_epsilon=5", "base.rounds=2", "strategy.rounds=3", "methods=[fedp2eft]"])
    found = forecast(exp, 160)
    assert found is not None
    assert 4.9 < max(found.by_method.values()) <= 5


def test_the_lines_name_the_relation_delta_and_what_is_not_covered() -> None:
    exp = compose([], [*ONE, "base.rounds=2", "methods=[lora]"])
    text = "\n".join(privacy_lines(exp, seen_clients(exp)))
    assert mechanism(exp, 160) == Mechanism(1.0, 0.1, default_delta(160), "fixed", 160)
    for words in ("one client replaced", "delta = 0.00376", "lambda strategies", "early stopping", "seeded"):
        assert words in text
    nothing = compose([], [*ONE, "base=none", "methods=[lora]"])
    assert "nothing that noise could be added to" in "\n".join(privacy_lines(nothing, 160))
