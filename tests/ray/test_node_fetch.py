"""What a stage needs reaches a node once, however many actors the node has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bucket_store
import pytest
from tiny import open_run, tiny

from fedtailor.experiment.execute import Execution
from fedtailor.storage.artifacts import MANIFEST, read_manifest

pytestmark = pytest.mark.ray


def test_two_actors_of_a_node_load_model_and_data_once(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from actors.ray_pool import RayPool

    def unused(*_: Any) -> Any:
        raise AssertionError("a pool was made")

    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "the-driver's-node"))
    exp = tiny(tmp_path, f"storage=bucket://{tmp_path}/bucket", "engine.actors=2", "engine.num_cpus=0.5")
    execution = Execution(exp, open_run(exp), unused, lambda event: None, lambda: False)
    inputs, stages = execution._prepare(42)
    spec = execution._spec(stages[0], inputs)
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "the-actors'-node"))
    pool = RayPool(exp.engine, lambda event: None, worker="bucket_worker:BucketWorker")
    try:
        assert pool.size == 2
        info = pool.open(spec)
        while not all(slot.idle for slot in pool._supervisor.slots):  # `open` returns with the first
            pool._supervisor.wait()
    finally:
        pool.close()
    assert info.modules
    read = bucket_store.reads(tmp_path / "bucket.log")
    needed = [n for path in (spec.model_dir, spec.data_dir) for n in read_manifest(execution.storage, path)]
    assert "model.safetensors" in needed
    assert sorted(name for name in read if name != MANIFEST) == sorted(needed)
    # Each of the two looked for model and data, and for the model whose features it would keep.
    assert read.count(MANIFEST) == 6
