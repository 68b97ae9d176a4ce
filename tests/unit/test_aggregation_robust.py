"""Robust aggregators: plain means where nobody lies, and close to the honest clients' result where some do (F18)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
from tiny import run_tiny, tiny

from fedtailor.aggregation.robust import CoordinateMedian, Krum, TrimmedMean
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.errors import ConfigError
from fedtailor.core.messages import Row, SegmentJob, SegmentResult
from fedtailor.core.seeding import numpy_rng
from fedtailor.experiment.compose import compose
from fedtailor.federated.method import Aggregator, Method
from fedtailor.federated.pool import Meanwhile
from fedtailor.federated.rounds import RoundOutcome, RoundPlan, RoundState, run_rounds
from fedtailor.federated.updates import clip_update, norm_alarms
from fedtailor.methods import build_method
from fedtailor.methods.build import with_aggregation

ROBUST: dict[str, Aggregator] = {"median": CoordinateMedian(), "trimmed mean": TrimmedMean(0.3), "Krum": Krum(0.3)}


def rows_of(count: int, size: int = 12) -> list[Row]:
    rng = numpy_rng("robust", count, size)
    return [rng.normal(1.0, 0.1, size).astype(np.float32) for _ in range(count)]


def aggregate(aggregator: Aggregator, rows: Sequence[Row], segments: int = 1) -> Row:
    parts = []
    for piece in np.array_split(np.arange(len(rows)), segments):
        state = aggregator.zero(rows[0].size)
        for i in piece:
            state = aggregator.add(state, rows[i], 7.0 * (i + 1))
        parts.append(state)
    total = parts[0]
    for part in parts[1:]:
        total = aggregator.merge(total, part)
    return aggregator.result(total)


@pytest.mark.parametrize("aggregator", [TrimmedMean(0.0), Krum(0.0)], ids=["trim 0", "no liar assumed"])
def test_without_suspicion_it_is_the_uniform_mean(aggregator: Aggregator) -> None:
    rows = rows_of(9)
    np.testing.assert_allclose(aggregate(aggregator, rows), aggregate(WeightedMean(uniform=True), rows), rtol=1e-6)


@pytest.mark.parametrize("aggregator", ROBUST.values(), ids=ROBUST)
def test_neither_segments_nor_claimed_sizes_change_a_byte(aggregator: Aggregator) -> None:
    rows = rows_of(10)
    assert aggregate(aggregator, rows, 4).tobytes() == aggregate(aggregator, rows).tobytes()
    assert not aggregator.presum


@pytest.mark.parametrize("aggregator", ROBUST.values(), ids=ROBUST)
@pytest.mark.parametrize("lie", [1e30, -1e6, 1.4], ids=str)
def test_the_result_stays_among_the_honest_whatever_three_of_ten_send(aggregator: Aggregator, lie: float) -> None:
    honest = rows_of(7)
    liars = [np.full(12, lie, np.float32)] * 3
    found = aggregate(aggregator, [*liars[:2], *honest, liars[2]])
    stack = np.stack(honest)
    assert (found >= stack.min(0)).all()
    assert (found <= stack.max(0)).all()


def test_one_of_ten_suffices_to_move_the_mean() -> None:
    assert abs(aggregate(WeightedMean(), [*rows_of(9), np.full(12, 1e6, np.float32)])).min() > 1e5


def test_krum_is_one_honest_client_s_own_row() -> None:
    honest = rows_of(7)
    found = aggregate(Krum(0.3, kept=1), [np.full(12, 50.0, np.float32), *honest])
    assert any(found.tobytes() == row.tobytes() for row in honest)


@pytest.mark.parametrize("aggregator", ROBUST.values(), ids=ROBUST)
def test_no_client_is_an_error_and_one_is_itself(aggregator: Aggregator) -> None:
    row = rows_of(1)[0]
    assert aggregate(aggregator, [row]).tobytes() == row.tobytes()
    with pytest.raises(ZeroDivisionError):
        aggregator.result(aggregator.zero(3))


@pytest.mark.parametrize("aggregator", ROBUST.values(), ids=ROBUST)
def test_the_product_of_a_lora_survives_though_a_and_b_are_joined_apart(aggregator: Aggregator) -> None:
    """What the model computes with is B A, and a mean of products is not the product of means."""
    rank, width = 2, 6

    def product(row: Row) -> np.ndarray:
        a, b = row[: rank * width].reshape(rank, width), row[rank * width :].reshape(width, rank)
        return b @ a

    honest = rows_of(8, 2 * rank * width)
    liars = [-1e4 * row for row in rows_of(2, 2 * rank * width)]
    clean = np.mean([product(row) for row in honest], axis=0)
    error = abs(product(aggregate(aggregator, [*liars, *honest])) - clean).max() / abs(clean).max()
    plain = abs(product(aggregate(WeightedMean(uniform=True), [*liars, *honest])) - clean).max() / abs(clean).max()
    assert error < 0.15
    assert plain > 1e4


def test_a_short_update_is_not_touched_and_a_long_one_keeps_its_direction() -> None:
    received, row = rows_of(2)
    same, norm = clip_update(row, received, float("inf"))
    assert same is row
    cut, before = clip_update(row, received, norm / 4)
    assert before == norm
    assert np.linalg.norm((cut - received).astype(np.float64)) == pytest.approx(norm / 4, rel=1e-5)
    np.testing.assert_allclose((cut - received) * 4, row - received, atol=1e-6)


def test_an_update_far_above_the_median_raises_the_alarm() -> None:
    norms = {"a": 1.0, "b": 1.1, "c": 0.9, "liar": 40.0}
    (alarm,) = norm_alarms(norms, 10)
    assert alarm["client"] == "liar"
    assert not norm_alarms(norms, 50)
    assert not norm_alarms({}, 10)


# Federated softmax regression on four Gaussian classes: convex, so that five points are five points.
CLASSES, FEATURES, CLIENTS = 4, 8, 20
LIARS = [f"c{i:02d}" for i in range(6)]
Attack = Callable[[Row, Row, list[Row]], Row]


def texts(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    centres = numpy_rng("centres").normal(0, 1.1, (CLASSES, FEATURES))
    rng = numpy_rng("points", name)
    labels = rng.integers(0, CLASSES, count)
    return centres[labels] + rng.normal(0, 1, (count, FEATURES)), labels


def gradient(weights: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scores = np.exp(x @ weights - (x @ weights).max(1, keepdims=True))
    return x.T @ (scores / scores.sum(1, keepdims=True) - np.eye(CLASSES)[y]) / len(x)


class Liars:
    """A pool whose clients train honestly, but for some."""

    size = 1

    def __init__(self, method: Method, attack: Attack | None, flip_labels: bool = False) -> None:
        self.method, self.attack, self.flip_labels = method, attack, flip_labels

    def trained(self, client: str, shared: Row) -> Row:
        x, y = texts(client, 60)
        y = (y + 1) % CLASSES if self.flip_labels and client in LIARS else y
        weights = shared.reshape(FEATURES, CLASSES).astype(np.float64)
        for _ in range(5):
            weights = weights - 0.3 * gradient(weights, x, y)
        return weights.ravel().astype(np.float32)

    def run(
        self, jobs: Sequence[SegmentJob], shared: Row, on_result: object, meanwhile: Meanwhile
    ) -> list[SegmentResult]:
        meanwhile()
        sent = {client: self.trained(client, shared) for job in jobs for client in job.clients}
        honest = [row for client, row in sent.items() if client not in LIARS]
        if self.attack:
            sent |= {client: self.attack(sent[client], shared, honest) for client in LIARS if client in sent}
        return [self.answer(job, sent, shared) for job in jobs]

    def answer(self, job: SegmentJob, sent: dict[str, Row], shared: Row) -> SegmentResult:
        result = SegmentResult(job.stage, job.round, job.index, job.attempt, valid=job.clients)
        mean = self.method.aggregator
        result.partial = mean.zero(shared.size) if mean.presum else []
        for client in job.clients:
            row, result.norms[client] = clip_update(sent[client], shared, self.method.bound)
            if mean.presum:
                result.partial = mean.add(result.partial, row, 1.0)
            else:
                result.partial.append((client, row, 1.0))
        return result


class Memory:
    """A round log that forgets."""

    def __init__(self) -> None:
        self.outcomes: list[RoundOutcome] = []

    def newest(self) -> RoundState | None:
        return None

    def commit(self, outcome: RoundOutcome) -> None:
        self.outcomes.append(outcome)

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} is not needed here")


def accuracy_after(words: Sequence[str], attack: Attack | None, flip_labels: bool = False) -> tuple[float, int]:
    """Test accuracy in %, and the number of norm alarms."""
    method = with_aggregation(build_method("fedavg", {}, 1), compose([], list(words)).aggregation)
    names = tuple(f"c{i:02d}" for i in range(CLIENTS))
    plan = RoundPlan("base/seed1", 1, 20, names, dict.fromkeys(names, 60), CLIENTS, 4, 2)
    log, start = Memory(), np.zeros(FEATURES * CLASSES, np.float32)
    pool = Liars(method, attack, flip_labels)
    state = run_rounds(plan, method, pool, start, log, lambda r: None, lambda o: None)  # type: ignore[arg-type]
    x, y = texts("test", 4000)
    hits = (x @ state.shared.reshape(FEATURES, CLASSES)).argmax(1) == y
    return 100 * float(hits.mean()), sum(w["kind"] == "norm-alarm" for o in log.outcomes for w in o.warnings)


def flipped(row: Row, received: Row, honest: list[Row]) -> Row:
    return received - 4 * (row - received)


def huge(row: Row, received: Row, honest: list[Row]) -> Row:
    return (received + 1e6 * (row - received)[::-1]).astype(np.float32)


def a_little(row: Row, received: Row, honest: list[Row]) -> Row:
    """ALIE (Baruch et al., 2019): as far from the honest mean as hides in their spread."""
    stack = np.stack(honest)
    return (stack.mean(0) - 1.0 * stack.std(0)).astype(np.float32)


ATTACKS: dict[str, tuple[Attack | None, bool]] = {
    "sign flip": (flipped, False), "a million times": (huge, False), "a little": (a_little, False),
    "labels flipped": (None, True),
}  # fmt: skip
DEFENCES = ("aggregation=median", "aggregation=trimmed_mean", "aggregation=krum")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("defence", DEFENCES)
def test_six_liars_of_twenty_cost_at_most_five_points(attack: str, defence: str) -> None:
    clean, _ = accuracy_after([], None)
    attacked, _ = accuracy_after([defence], *ATTACKS[attack])
    assert clean > 70
    assert attacked > clean - 5


def test_the_plain_mean_fails_and_says_so() -> None:
    clean, quiet = accuracy_after([], None)
    attacked, alarms = accuracy_after([], huge)
    assert quiet == 0
    assert attacked < clean - 20
    assert alarms >= len(LIARS)


def test_a_norm_bound_contains_what_is_only_long() -> None:
    clean, _ = accuracy_after([], None)
    attacked, alarms = accuracy_after(["aggregation=norm_bound", "aggregation.bound=0.5"], huge)
    assert attacked > clean - 5
    assert alarms >= len(LIARS)


def test_a_bound_that_nobody_reaches_changes_no_byte_of_a_run(tmp_path) -> None:  # type: ignore[no-untyped-def]
    words = ("methods=[base]", "base.rounds=2", "fedavg.adapter=lora", "personalise.pools=[seen]")
    plain = run_tiny(tiny(tmp_path / "a", *words)).metrics()
    bound = run_tiny(tiny(tmp_path / "b", *words, "aggregation=norm_bound", "aggregation.bound=1e9")).metrics()
    assert plain.equals(bound)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["aggregation=norm_bound"], "aggregation.bound"),
        (["aggregation=krum", "aggregation.bound=1"], "aggregation.bound"),
        (["aggregation=krumm"], "did you mean 'krum'"),
        (["aggregation=trimmed_mean", "aggregation.trim=0.5"], "aggregation.trim"),
    ],
)
def test_bad_settings_are_refused(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose([], words)


def test_a_guard_makes_another_artifact() -> None:
    from fedtailor.experiment.stages import Inputs, plan_stages

    exp = compose([], ["base.rounds=1", "methods=[base]"])
    other = exp.model_copy(update={"aggregation": exp.aggregation.model_copy(update={"name": "median"})})
    names = [plan_stages(e, 42, Inputs("d", "m", "t"), 160)[0].artifact for e in (exp, other)]
    assert names[0] != names[1]
