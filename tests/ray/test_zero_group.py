"""A client on two ranks is the same client; a rank that dies costs time and nothing else; no empty shard gets out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from tiny import run_tiny, talk
from zero_worker import ZeroWorker, make_base, zero_stage

from actors.ray_pool import RayPool
from fedtailor.core.errors import WorkerError
from fedtailor.core.messages import SegmentJob, SegmentResult
from fedtailor.core.settings import EngineConfig
from fedtailor.worker.worker import content_hash

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

CLIENT = "seen/xx/00"
JOB = SegmentJob("personalise/bayestune_lora/seed3", 0, 0, (CLIENT,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the base, in shards."""
    folder = tmp_path_factory.mktemp("zero")
    make_base(folder / "base")
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> SegmentResult:
    """What one process computes."""
    worker = ZeroWorker()
    worker.open(zero_stage(folder, ranks=1))
    return worker.run(JOB, None)


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[tuple[RayPool, list[dict[str, Any]]]]:
    """One group of two ranks."""
    events: list[dict[str, Any]] = []
    config = EngineConfig(actors=1, num_cpus=0.5, retries=1, zero={"ranks": 2, "deadline_s": 5.0})  # type: ignore[arg-type]
    pool = RayPool(config, events.append, worker="zero_worker:ZeroWorker")
    yield pool, events
    pool.close()


@pytest.fixture(scope="module")
def together(pool: tuple[RayPool, list[dict[str, Any]]], folder: Path) -> SegmentResult:
    """What the group computes."""
    pool[0].open(zero_stage(folder))
    [result] = pool[0].run([JOB], None, lambda _: None)
    return result


def test_two_ranks_train_what_one_process_trains(alone: SegmentResult, together: SegmentResult) -> None:
    for name in ("lambda", "a_b"):
        np.testing.assert_allclose(together.tensors[name], alone.tensors[name], rtol=0, atol=1e-5)
    assert together.metrics[0]["value"] == pytest.approx(alone.metrics[0]["value"], abs=1e-5)
    assert np.abs(alone.tensors["a_b"]).max() > 1e-3


def test_each_rank_keeps_about_half_of_the_base(alone: SegmentResult, together: SegmentResult, folder: Path) -> None:
    from transformers import LlamaForCausalLM

    whole = sum(p.numel() * 4 for p in LlamaForCausalLM.from_pretrained(folder / "base").parameters())
    assert together.host["base_bytes"] / whole == pytest.approx(0.5, abs=0.02)


def test_adapters_of_a_group_give_the_same_scores_in_plain_peft(
    together: SegmentResult, folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from toy import toy_lanes, with_prompts
    from transformers import LlamaForCausalLM

    from fedtailor.lanes.batches import make_batch

    [lane] = with_prompts(toy_lanes([8]))
    batch = make_batch([lane.train], [np.arange(8)], 0)
    for number, budget in enumerate((2, 4)):
        adapter = tmp_path / f"r{budget}"
        adapter.mkdir()
        for name, content in together.adapters[f"r{budget}/{CLIENT}"].items():
            (adapter / name).write_bytes(content)
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(folder / "base"), adapter).eval()
        with torch.no_grad():
            scores = model(input_ids=batch.input_ids[0], attention_mask=batch.attention_mask[0]).logits
        own = scores.flatten(0, 1)[batch.positions[0]]  # type: ignore[index]
        np.testing.assert_allclose(own, together.tensors["logits"][number], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_rank_that_dies_or_hangs_restarts_the_group_and_the_result_is_the_same(
    pool: tuple[RayPool, list[dict[str, Any]]], together: SegmentResult, folder: Path, fault: str
) -> None:
    pool[0].open(zero_stage(folder, **{fault: True}))
    [leader] = pool[0]._supervisor.slots
    before = {host.pid for host in ray.get(leader.actor.ranks.remote())}
    pool[1].clear()
    [result] = pool[0].run([JOB], None, lambda _: None)
    assert content_hash(result) == content_hash(together)
    assert result.attempt == 1
    lost = [event for event in pool[1] if event["event"] == "actor_lost"]
    assert len(lost) == 1
    assert lost[0]["kind"] in ("death", "hang")
    after = {host.pid for host in ray.get(pool[0]._supervisor.slots[0].actor.ranks.remote())}
    assert not before & after


def test_a_gather_that_returns_empty_shards_is_refused(
    pool: tuple[RayPool, list[dict[str, Any]]], folder: Path
) -> None:
    pool[0].open(zero_stage(folder, no_gather=True))
    with pytest.raises(WorkerError, match="ZeRO gathered a weight"):
        pool[0].run([JOB], None, lambda _: None)


def test_an_exported_adapter_with_empty_tensors_is_refused(
    pool: tuple[RayPool, list[dict[str, Any]]], folder: Path
) -> None:
    pool[0].open(zero_stage(folder, empty_export=True))
    with pytest.raises(WorkerError, match=r"the adapter r2/seen/xx/00 is refused: .* is empty"):
        pool[0].run([JOB], None, lambda _: None)


FEW = (
    "base=none", "methods=[fedp2eft]", "strategy.rounds=1", "strategy.cohort=2", "personalise.pools=[unseen]",
    "decoding.max_new_tokens=2", "budgets=[2]",
)  # fmt: skip
KEYS = ["stage", "client", "budget", "module", "metric", "language"]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Those of a whole run in one process, by key."""
    return run_tiny(talk(tmp_path_factory.mktemp("one-process"), *FEW)).metrics().set_index(KEYS).value


@pytest.mark.parametrize("stage", [1, 3])
def test_a_whole_run_under_zero_has_the_numbers_of_one_process(
    cluster: None, tmp_path: Path, numbers: Any, stage: int
) -> None:
    zero = ["engine.backend=ray", "engine.actors=1", "engine.num_cpus=0.5", f"engine.zero={{ranks: 2, stage: {stage}}}"]
    exp = talk(tmp_path, *FEW, *zero)
    found = run_tiny(exp, pool=lambda on_event: RayPool(exp.engine, on_event)).metrics().set_index(KEYS).value
    assert len(found) == len(numbers)
    np.testing.assert_allclose(found, numbers, rtol=0, atol=1e-5)
    # Rows are dealt out to the ranks, so that sums are rounded differently somewhere.
    assert (found != numbers).any()
