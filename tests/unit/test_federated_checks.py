"""What a worker answers is checked by name before it is summed; the segment and the part that is wrong are named."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedtailor.aggregation.robust import Krum
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.errors import ClientError, RoundError
from fedtailor.core.faults import REPLY, Sabotage, parse
from fedtailor.core.messages import Failure, SegmentJob, SegmentResult, metric_row
from fedtailor.federated.checks import checked_results
from fedtailor.federated.rounds import RoundOutcome, RoundPlan, RoundState, close_round
from fedtailor.lanes.grouping import segments
from fedtailor.methods import build_method

SIZE, STAGE = 4, "base/seed1"
NAMES = tuple(f"seen/xx/{i:02d}" for i in range(8))
PLAN = RoundPlan(STAGE, 1, 5, NAMES, dict.fromkeys(NAMES, 10), 8, 4, 2, private=0)
ASKED = segments(NAMES, 4, 2)
STATE = RoundState(2, np.zeros(SIZE, np.float32), {})


def answer(index: int, clients: tuple[str, ...], presum: bool = True, private: int = 0) -> SegmentResult:
    mean = WeightedMean()
    rows = [(c, np.full(SIZE, int(c[-2:]), np.float32), 10.0) for c in clients]
    total: Any = mean.zero(SIZE)
    for _, row, weight in rows:
        total = mean.add(total, row, weight)
    result = SegmentResult(STAGE, 2, index, 0, total if presum else rows, valid=clients)
    result.metrics = [
        metric_row(stage="base", seed=1, round=2, client=c, metric=m, value=1.0)
        for c in clients
        for m in ("loss", "acc")
    ]
    result.private = {c: np.zeros(private, np.float32) for c in clients} if private else {}
    return result


def answers(presum: bool = True, private: int = 0) -> list[SegmentResult]:
    return [answer(i, clients, presum, private) for i, clients in enumerate(ASKED)]


def damaged(kind: str, **how: Any) -> list[SegmentResult]:
    """Segment 2 answers wrongly."""
    found = answers(**how)
    job = SegmentJob(STAGE, 2, 2, ASKED[2])
    found[2] = Sabotage(parse(kind), job).reply(found[2])
    return found


def close(results: list[SegmentResult], **plan: Any) -> RoundOutcome:
    method = build_method("fedavg", {}, 1)
    return close_round(replace(PLAN, **plan), method, STATE, NAMES, results)


TOLD = {
    "shape": r"partial.total is float64 \(3,\), expected float64 \(4,\)",
    "dtype": r"partial.total is float16 \(4,\), expected float64 \(4,\)",
    "poison": "partial.total is not finite",
    "missing": "partial is missing, expected a WeightedSum",
    "foreign": "client nobody/asked/00 was not asked for",
    "twice": "client seen/xx/04 is named twice",
    "lost": "client seen/xx/05 is neither counted nor reported as failed",
    "rows-missing": "client seen/xx/04 has no metrics, others have",
    "rows-foreign": "metric loss is of client 'nobody/asked/00', which is not counted in it",
    "rows-twice": "metric loss of client seen/xx/04 occurs twice",
    "private": r"the private row of client seen/xx/04 is float32 \(1,\), expected float32 \(0,\)",
}


def test_every_kind_of_damage_has_its_sentence() -> None:
    assert set(TOLD) == set(REPLY)


def test_good_answers_are_handed_on_as_they_are() -> None:
    for private in (0, 3):
        found = answers(private=private)
        assert all(
            a is b for a, b in zip(checked_results(found, ASKED, WeightedMean(), SIZE, private), found, strict=True)
        )


@pytest.mark.parametrize("kind", TOLD)
def test_a_bad_answer_fails_the_round_and_names_segment_client_and_tensor(kind: str) -> None:
    with pytest.raises(ClientError, match=rf"seen/xx/04, base/seed1, round 2: .*segment 2 is refused: {TOLD[kind]}"):
        close(damaged(kind))


@pytest.mark.parametrize("kind", TOLD)
def test_with_drop_the_round_is_closed_without_that_segment(kind: str) -> None:
    outcome = close(damaged(kind), drop_failures=True)
    left = [c for c in NAMES if c not in ASKED[2]]
    assert list(outcome.weights) == left
    np.testing.assert_array_equal(outcome.state.shared, np.full(SIZE, np.mean([int(c[-2:]) for c in left]), np.float32))
    assert {row["client"] for row in outcome.metrics} == {*left, ""}
    assert [(f.client, f.kind) for f in outcome.failures] == [(c, "exception") for c in ASKED[2]]
    [row] = [row for row in outcome.metrics if row["metric"] == "rejected_clients"]
    assert row["value"] == len(ASKED[2])


def test_fewer_good_answers_than_the_quorum_close_no_round() -> None:
    results = answers()
    for i in (0, 1, 2):
        results[i] = Sabotage(parse("missing"), SegmentJob(STAGE, 2, i, ASKED[i])).reply(results[i])
    with pytest.raises(RoundError, match="2 of 8 updates are valid, 4 needed"):
        close(results, drop_failures=True)


@pytest.mark.parametrize("kind", ["shape", "dtype", "poison", "missing"])
def test_updates_sent_one_by_one_are_checked_one_by_one(kind: str) -> None:
    [good, _, bad, _] = checked_results(damaged(kind, presum=False), ASKED, Krum(0.25), SIZE, 0)
    assert good.valid == ASKED[0]
    assert bad.valid == ()
    assert "the update of client seen/xx/04" in bad.failures[0].reason or "partial is missing" in bad.failures[0].reason


def test_updates_in_another_order_than_the_names_are_refused() -> None:
    results = answers(presum=False)
    results[1].partial.reverse()
    [_, bad, *_] = checked_results(results, ASKED, Krum(0.25), SIZE, 0)
    assert "partial has updates of seen/xx/03, seen/xx/02, counted are seen/xx/02, seen/xx/03" in bad.failures[0].reason


def test_a_sum_without_weight_is_refused() -> None:
    results = answers()
    results[0].partial = WeightedMean().zero(SIZE)
    with pytest.raises(ClientError, match="the weight of partial is 0"):
        close(results)


def test_a_missing_private_row_is_refused() -> None:
    results = answers(private=3)
    del results[3].private[NAMES[7]]
    [*_, bad] = checked_results(results, ASKED, WeightedMean(), SIZE, 3)
    assert "client seen/xx/07 has no private row" in bad.failures[0].reason


@dataclass(frozen=True)
class Named:
    """An aggregator whose state has named tensors."""

    presum: bool = True

    def zero(self, size: int) -> dict[str, np.ndarray]:
        return {"a": np.zeros(size), "b": np.zeros(size)}

    def weight(self, state: Any) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("names", "told"), [("ba", r"\['b', 'a'\], expected \['a', 'b'\]"), ("a", r"\['a'\]"), ("abc", "'c'")]
)
def test_tensors_in_another_order_missing_or_more_are_refused_never_zipped(names: str, told: str) -> None:
    results = answers()
    for i, result in enumerate(results):
        result.partial = {name: np.zeros(SIZE) for name in (names if i == 1 else "ab")}
    found = checked_results(results, ASKED, Named(), SIZE, 0)  # type: ignore[arg-type]
    assert [bool(result.valid) for result in found] == [True, False, True, True]
    import re

    assert re.search(told, found[1].failures[0].reason)


def test_a_client_that_failed_where_it_ran_is_no_damage() -> None:
    results = answers()
    short = answer(0, ASKED[0][:1])
    short.failures = [Failure(ASKED[0][1], STAGE, 2, "rejected", "NaN or Inf in the update")]
    outcome = close([short, *results[1:]])
    assert list(outcome.weights) == [c for c in NAMES if c != ASKED[0][1]]
    assert [row["value"] for row in outcome.metrics if row["metric"] == "rejected_clients"] == [1.0]


def test_an_undisturbed_round_has_no_row_about_rejections() -> None:
    assert "rejected_clients" not in {row["metric"] for row in close(answers()).metrics}
