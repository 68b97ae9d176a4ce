"""Fault plans: what they say, whom they meet, and that nothing happens without one."""

from __future__ import annotations

import errno
import math

import numpy as np
import pytest

from fedtailor.core import faults
from fedtailor.core.errors import ConfigError
from fedtailor.core.faults import Sabotage, parse, planned
from fedtailor.core.messages import SegmentJob

JOB = SegmentJob("base/seed42", 3, 1, ("a", "b", "c"))


def test_a_plan_names_commit_points_and_worker_faults() -> None:
    plan = parse("commit:start@2; enospc:commit:latest@1; kill stage=base round=4 client=#1 step=2; nan attempt=always")
    assert plan.commits == {("commit:start", 2): "kill", ("commit:latest", 1): "enospc"}
    kill, nan = plan.workers
    assert (kill.kind, kill.stage, kill.round, kill.client, kill.step, kill.attempt) == ("kill", "base", 4, "#1", 2, 0)
    assert nan.attempt == "always"


def test_nothing_is_planned_without_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(faults.VARIABLE, raising=False)
    assert planned() is None
    faults.point("commit:start")


@pytest.mark.parametrize(
    "text",
    [
        ";", "explode", "commit:nowhere@1", "commit:start@0", "eperm:commit:start@1", "kill round=x", "kill round=-1",
        "kill colour=red", "kill round", "kill round=1 round=2", "nan client=#x", "flip",
        "nan share=0.5", "kill stage=",
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_read_is_refused_with_what_is_allowed(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(faults.VARIABLE, text)
    with pytest.raises(ConfigError, match=r"FEDTAILOR_FAULT="):
        planned()


def test_all_problems_of_a_plan_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        parse("explode; kill colour=red; nan")
    assert len(error.value.problems) == 2


@pytest.mark.parametrize(
    ("text", "meets"),
    [
        ("kill", True),
        ("kill stage=base", True),
        ("kill stage=base/seed42", True),
        ("kill stage=bas", False),
        ("kill stage=strategy", False),
        ("kill round=3 segment=1", True),
        ("kill round=2", False),
        ("kill segment=0", False),
        ("kill client=b", True),
        ("kill client=d", False),
        ("kill client=#2", True),
        ("kill client=#3", False),
        ("kill attempt=1", False),
        ("kill attempt=always", True),
    ],
)
def test_a_fault_meets_the_segments_that_all_its_keys_fit(text: str, meets: bool) -> None:
    assert parse(text).workers[0].meets(JOB, JOB.clients) is meets


def test_a_retry_is_spared_unless_the_plan_says_always() -> None:
    again = SegmentJob("base/seed42", 3, 1, ("a",), attempt=1)
    assert not parse("kill").workers[0].meets(again, again.clients)
    assert parse("kill attempt=always").workers[0].meets(again, again.clients)


def test_a_client_s_update_is_spoilt_or_set_aside() -> None:
    row = np.array([2.0, 0.5], np.float32)

    def sent(text: str) -> np.ndarray | None:
        return Sabotage(parse(text), JOB).update("b", row)

    np.testing.assert_array_equal(sent("nan client=a"), row)
    nan, inf = sent("nan client=b"), sent("inf")
    assert nan is not None
    assert inf is not None
    assert math.isnan(nan[0])
    assert math.isinf(inf[0])
    assert row[0] == 2.0, "the client's own array stays"
    assert sent("absent") is None


def test_a_process_fault_strikes_at_its_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    struck: list[int] = []
    model = torch.nn.Linear(1, 1)
    passes = 0
    monkeypatch.setattr(faults, "strike", lambda fault: struck.append(passes))
    with Sabotage(parse("kill step=2"), JOB).during(["a"], model):
        for _ in range(3):
            model(torch.zeros(1))
            passes += 1
    model(torch.zeros(1))
    assert struck == [1], "after one whole pass, at the beginning of the second, and only once"
    with Sabotage(parse("kill client=c step=0"), JOB).during(["a", "b"], model):
        pass
    assert struck == [1], "another group's client"


def test_several_faults_of_storage_count_their_own_hits(monkeypatch: pytest.MonkeyPatch) -> None:
    faults._passes.clear()
    monkeypatch.setenv(faults.VARIABLE, "erofs:commit:start@1; enospc:commit:start@3")
    codes = []
    for _ in range(4):
        try:
            faults.point("commit:start")
            codes.append(0)
        except OSError as error:
            codes.append(error.errno or -1)
    assert codes == [errno.EROFS, 0, errno.ENOSPC, 0]
    faults._passes.clear()
