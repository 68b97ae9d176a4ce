"""`make bench-3b`: the architecture of Llama-3.2-3B under ZeRO-3 on two CPU ranks, with random weights.

A client with four texts of 16 tokens plays its part of a round of FedP2EFT: features, the rank search (stage 1,
r_init 32, two steps of two texts), the strategy generator (stage 2). Then a client with two texts does so under the
reference's switch that counts the output embedding. Writes a folder of 6.4 GB and deletes it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import sys
import tempfile
import time
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
for place in (HERE, HERE.parent):
    if str(place) not in sys.path:
        sys.path.append(str(place))

from toy import ToyClient

from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec, metric_row
from fedtailor.core.scope import Ranks, Scope
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import EngineConfig, ModelConfig, ZeroConfig
from fedtailor.federated.context import ClientContext, Federation, Lane, Received, open_params
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.models.families import adapted_linears
from fedtailor.models.zero import base_bytes, load_partitioned
from fedtailor.worker.worker import check_answer

TOKENS, PROMPT = 16, 8
CONFIG = "llama_3_2_3b_config.json"
LIMIT_GB = 10.0


def make_folder(folder: Path, tiny: bool) -> int:
    """Random bfloat16 weights in shards, one in memory at a time; how many numbers they are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    content = json.loads((resources.files("fedtailor.models") / CONFIG).read_text("utf-8"))
    if tiny:
        content |= {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 2000, "head_dim": 16}
        content |= {"num_hidden_layers": 3, "num_attention_heads": 16}
    (folder / "config.json").write_text(json.dumps(content))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    where = {name: _shard(name) for name in shapes}
    generator = torch.Generator().manual_seed(1)
    for file in dict.fromkeys(where.values()):
        shard = {name: _draw(shape, generator) for name, shape in shapes.items() if where[name] == file}
        save_file(shard, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(math.prod(shape) for shape in shapes.values())


def _shard(name: str) -> str:
    """Four blocks to a file; what is in no block has one of its own."""
    parts = name.split(".")
    return f"model-{int(parts[2]) // 4:02d}.safetensors" if "layers" in parts else "model-rest.safetensors"


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    weight = torch.empty(shape, dtype=torch.bfloat16)
    return weight.normal_(0, 0.02, generator=generator) if len(shape) > 1 else weight.fill_(1.0)


def client(size: int, vocabulary: int) -> Lane:
    """Texts of `TOKENS` random tokens, the first `PROMPT` of them the prompt."""
    ids = numpy_rng("bench-3b", size).integers(5, vocabulary, (size, TOKENS))
    full = np.full(size, TOKENS, np.int64)
    examples = Examples(ids, full, np.zeros(size, np.int64), prompt_length=np.full(size, PROMPT, np.int64))
    return Lane(ToyClient(f"seen/xx/{size:02d}", "seen", "xx", size, 0), examples)  # type: ignore[arg-type]


class ThreeBillion:
    """A worker of one rank; each writes what it saw to ``rank-<i>.json``."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks, self._seen = ranks, dict[str, Any]()

    def open(self, spec: StageSpec) -> StageInfo:
        """Builds the base, and nothing else."""
        started = time.perf_counter()
        self._config = spec.method_config
        model, probe = load_partitioned(Path(spec.model_dir), "generation", (), torch.bfloat16, self._ranks.size)
        linears = adapted_linears(model, "all-linear")
        self._net = LaneNet(model, linears, "bfloat16", 0.0, True, self._ranks, probe.check)
        self._seen |= {
            "build_s": time.perf_counter() - started,
            "base_gb": base_bytes(model) / 1e9,
            "peak_build_gb": _peak(),
        }
        return StageInfo((), (), np.zeros(0, np.float32), self._net.modules, 32)

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        """One client's part of a round."""
        reference = bool(job.index)
        config = {
            "stage1": {"batch_size": 2, "epochs": 1},
            "psg": {"count_output": reference},
        }
        method = build_method("fedp2eft", config, 16)
        lane = client(2 if reference else 4, self._net.model.config.vocab_size)
        times: list[float] = []
        ctx = self._context(lane, method, times)
        marks = self._step_marks()
        started = time.perf_counter()
        report = method.local_update(ctx)  # type: ignore[misc]
        total = time.perf_counter() - started
        self._net.verify()
        shapes = {s.name: list(s.shape) for s in ctx.params.specs if s.name.startswith("psg.") and "weight" in s.name}
        steps = [b - a for a, b in pairwise(marks)]
        self._seen[f"call {job.index}"] = {
            "psg": shapes, "features_s": times, "total_s": total, "passes_s": steps,
            "loss": float(report.metrics["train_loss"]), "psg_loss": float(report.metrics["psg_loss"]),
            "psg_loss_after": float(report.metrics["psg_loss_after"]), "peak_gb": _peak(),
        }  # fmt: skip
        path = Path(self._config["folder"]) / f"rank-{self._ranks.index}.json"
        path.write_text(json.dumps(self._seen))
        result = SegmentResult(job.stage, job.round, job.index, job.attempt, valid=job.clients)
        result.tensors = {"phi": ctx.params.flat(Scope.SHARED).detach().numpy().copy()}
        result.metrics = [metric_row(metric=n, value=float(v)) for n, v in report.metrics.items()]
        check_answer(result, self._net)
        return result

    def _context(self, lane: Lane, method: Any, times: list[float]) -> ClientContext:
        def features(lanes: Any, pad_to: int | None) -> list[torch.Tensor]:
            started = time.perf_counter()
            found = [client_features(self._net, one.train, 0, pad_to) for one in lanes]
            times.append(time.perf_counter() - started)
            return found

        params = open_params(self._net, 1, method.adapter, method.modules, 1)
        shared = params.of_scope(Scope.SHARED)
        received = Received(shared, params.flat(Scope.SHARED).detach().clone(), [0])
        return ClientContext(
            federation=Federation((), (), 1),
            net=self._net, lanes=(lane,), params=params, seed=1, stage="strategy", round=0, num_labels=1, pad_id=0,
            feature_source=features, warn=lambda *_: None, r_max=16, received=received,
            fresh=torch.tensor([True]),
        )  # fmt: skip

    def _step_marks(self) -> list[float]:
        """Times at which passes through the model begin, features included."""
        marks: list[float] = []
        self._net.model.base_model.register_forward_pre_hook(lambda *_: marks.append(time.perf_counter()))  # type: ignore[operator]
        return marks


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def stage(folder: Path) -> StageSpec:
    """What the ranks are told."""
    return StageSpec(
        key="strategy/fedp2eft/seed1", kind="rounds", method="fedp2eft", seed=1, method_config={"folder": str(folder)},
        model_dir=str(folder / "model"), data_dir="", r_max=16, model=ModelConfig(weights="bfloat16"),
        engine=EngineConfig(max_lanes=1, dtype="bfloat16", zero=ZeroConfig(ranks=2)),
    )  # fmt: skip


def main() -> None:
    """Makes the folder, plays two calls on a group of two ranks, prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="for 6.4 GB; default: a temporary one")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    parser.add_argument("--tiny", action="store_true", help="a very small model: does everything run?")
    asked = parser.parse_args()
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="bench-3b-"))
    try:
        started = time.perf_counter()
        if not (folder / "model/model.safetensors.index.json").exists():
            print(f"{make_folder(folder / 'model', asked.tiny) / 1e9:.3f}e9 weights in {folder}", flush=True)
        print(f"folder: {time.perf_counter() - started:.0f} s", flush=True)
        play(folder)
    finally:
        if not asked.keep:
            shutil.rmtree(folder / "model" if asked.folder else folder, ignore_errors=True)


def play(folder: Path) -> None:
    """Two calls on two ranks."""
    from actors.ray_pool import RayPool

    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    config = EngineConfig(actors=1, deadline_s=3600, retries=0, dtype="bfloat16", zero={"ranks": 2, "deadline_s": 900})  # type: ignore[arg-type]
    pool = RayPool(config, lambda event: print(event, flush=True), worker="three_billion:ThreeBillion")
    try:
        started = time.perf_counter()
        pool.open(stage(folder))
        print(f"group up and base built: {time.perf_counter() - started:.0f} s", flush=True)
        for index in range(2):
            pool.run([SegmentJob("strategy/fedp2eft/seed1", index, index, ("seen/xx/04",))], None, lambda _: None)
    finally:
        pool.close()
    highest = 0.0
    for rank in range(2):
        seen = json.loads((folder / f"rank-{rank}.json").read_text())
        print(f"rank {rank}: {json.dumps(seen, indent=1)}")
        highest = max(highest, seen["call 1"]["peak_gb"])
    print(f"highest peak of a rank: {highest:.1f} GB (goal: {LIMIT_GB:g})")
    if highest > LIMIT_GB:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
