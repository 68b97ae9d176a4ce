"""What a segment's clients played one at a time add up to, and what they find when a group of them broke."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.messages import Failure, SegmentJob, SegmentResult
from fedtailor.worker.segment import Segment
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


class Activations:
    """What a forward pass keeps."""


class BreaksTogether(Segment):
    """Two clients are one too many; one alone looks whether what the two had is still there."""

    kept: weakref.ref[Activations]

    def _group(self, clients: Any) -> None:
        if len(clients) == 1:
            assert self.kept() is None, "the broken group's memory is still held"
            return
        activations = Activations()
        self.kept = weakref.ref(activations)
        try:
            raise MemoryError("of the allocator")
        except MemoryError as error:
            raise RuntimeError(f"out of memory beside {activations}") from error

    def _costs(self, clients: Any) -> dict[str, Any]:
        return {}

    def _add_in_order(self) -> None:
        pass


def test_what_a_broken_group_held_is_free_when_its_clients_run_one_by_one() -> None:
    net = SimpleNamespace(device=torch.device("cpu"), ranks=None, unbind=lambda: None)
    stage = SimpleNamespace(net=net, groups=lambda clients: [[0, 1]])
    result = BreaksTogether(stage, SegmentJob("base/seed0", 0, 0, ("a", "b")), None).play()  # type: ignore[arg-type]
    assert result.valid == ("a", "b")
    assert [warning["kind"] for warning in result.warnings] == ["group-rerun"]
    assert result.warnings[0]["reason"].startswith("RuntimeError: out of memory beside")
