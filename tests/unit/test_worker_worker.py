"""What a segment's clients played one at a time add up to."""

from __future__ import annotations

from typing import Any

import numpy as np

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.messages import Failure, SegmentResult
from fedtailor.worker.worker import merge_results


def alone(client: str, partial: Any, **more: Any) -> SegmentResult:
    return SegmentResult(
        "base/seed0", 1, 2, 0, partial, [{"client": client}], {client: np.zeros(1)},
        predictions=[{"client": client, "prediction": "yes"}], valid=(client,), norms={client: 1.0},
        seconds={client: 0.5}, host={"pid": ord(client)}, **more,
    )  # fmt: skip


def test_single_clients_make_one_segment_with_everything_that_each_brought() -> None:
    mean = WeightedMean()
    sums = [mean.add(mean.zero(2), np.full(2, value, np.float32), 1.0) for value in (1, 2)]
    lost = SegmentResult("base/seed0", 1, 2, 0, failures=[Failure("b", "base/seed0", 1, "exception", "gone")])
    whole = merge_results([alone("a", sums[0]), lost, alone("c", sums[1])])
    assert (whole.stage, whole.round, whole.index, whole.valid, whole.host) == (
        "base/seed0",
        1,
        2,
        ("a", "c"),
        {"pid": 97},
    )
    assert [row["client"] for row in whole.metrics] == [row["client"] for row in whole.predictions] == ["a", "c"]
    assert (list(whole.private), list(whole.norms), list(whole.seconds)) == (["a", "c"],) * 3
    assert [failure.client for failure in whole.failures] == ["b"]
    np.testing.assert_array_equal(whole.partial.total, [3, 3])
    assert merge_results([alone("a", [1]), lost, alone("c", [2])]).partial == [1, 2]
    assert merge_results([lost, alone("c", sums[1])]).partial is sums[1]
