"""`make bench-gpu`, what needs more than torch: Ray actors with fractions of a card, a base under DeepSpeed ZeRO-3."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_part import Bench

ACTORS = (1, 2, 4)
ZERO_S = 300.0


def ray(bench: Bench) -> None:
    """One federated job by one process and by actors that share the card; final parameters compared."""
    from job import write_job
    from regimes import REGIMES
    from run_ours import run

    from fedtailor.core.settings import EngineConfig

    regime = REGIMES[1].quick() if bench.quick else replace(REGIMES[1], rounds=5)
    card = bench.device == "cuda"
    with tempfile.TemporaryDirectory(prefix="bench-gpu") as folder:
        os.environ["BENCH_FIRST_STEP"] = str(Path(folder) / "first")
        job = write_job(regime, Path(folder) / "job")
        ways = [("one process", EngineConfig(backend="serial", num_gpus=float(card)))]
        ways += [
            (f"{n} actors" if n > 1 else "1 actor", EngineConfig(actors=n, num_gpus=1 / n if card else 0, num_cpus=0.5))
            for n in (ACTORS[1:2] if bench.quick else ACTORS)
        ]
        final, rates = None, {}
        for name, engine in ways:
            cells = {"who": name, "GPUs of each": engine.num_gpus}
            if bench.left < 15 and not bench.quick:
                bench.row(_ACTORS, {**cells, "note": "no time was left"})
                continue
            with bench.attempt(_ACTORS, cells, "note"):
                started = time.perf_counter()
                found = run(job, engine)
                final = found["final"] if final is None else final
                apart = float(np.linalg.norm(found["final"] - final) / np.linalg.norm(final))
                each = float(np.median(found["round_s"][1:]))
                rates[name] = regime.cohort / each
                bench.row(_ACTORS, {
                    **cells, "clients/s": rates[name], "first round, s": found["round_s"][0],
                    "in all, s": time.perf_counter() - started, "parameters apart": apart, "actors lost": found["lost"],
                })  # fmt: skip
                if not apart <= 1e-2 or found["lost"]:
                    bench.fail(f"{name}: parameters are {apart:.1e} apart, {found['lost']} actors lost")
        if rates:
            bench.answer("; ".join(f"{name} {rate:.0f} clients/s" for name, rate in rates.items()))


_ACTORS = "one federated job (regime mixed)"


def zero(bench: Bench) -> None:
    """A step on a base that ranks hold together: one rank on one card, since NCCL takes a card per rank."""
    ranks = min(2, torch.cuda.device_count()) if bench.device == "cuda" else 2
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="bench-gpu") as name:
        folder = Path(name)
        from zero_worker import make_base

        make_base(folder / "base")
        expected = _plain(folder / "base", bench.device)
        inbox = context.SimpleQueue()
        processes = [
            context.Process(target=rank, args=(inbox, index, ranks, str(folder), bench.device), daemon=True)
            for index in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            answers = [_answer(inbox, processes, bench.left) for _ in processes]
        finally:
            for process in processes:
                process.kill()
                process.join()
    for index, found in sorted(answers, key=lambda answer: answer[0]):
        apart = float((torch.from_numpy(found["gradient"]) - expected).norm() / expected.norm())
        bench.row("a step of a small LLaMA under ZeRO-3", {
            "rank": f"{index + 1} of {ranks}", "keeps, MB": found["bytes"] / 1e6, "ms a step": 1e3 * found["seconds"],
            "gradients apart": apart,
        })  # fmt: skip
        if not apart <= 1e-4:
            bench.fail(f"rank {index}: gradients are {apart:.1e} from those of a plain model")
    bench.answer(f"{ranks} rank(s): gradients are those of a plain model to {apart:.0e}")


def _answer(inbox: Any, processes: Any, limit: float) -> tuple[int, dict[str, Any]]:
    until = time.monotonic() + min(limit, ZERO_S)
    while inbox.empty():
        dead = [process.exitcode for process in processes if process.exitcode not in (None, 0)]
        if dead or time.monotonic() > until:
            raise RuntimeError(f"a rank ended with exit code {dead[0]}" if dead else "the ranks did not answer in time")
        time.sleep(0.1)
    found: tuple[int, dict[str, Any]] = inbox.get()
    return found


def _plain(folder: Path, device: str) -> torch.Tensor:
    from fedtailor.lanes.net import LaneNet
    from fedtailor.models.families import adapted_linears
    from fedtailor.models.load import load_causal

    model = load_causal(folder).to(device)  # type: ignore[arg-type]
    return _step(LaneNet(model, adapted_linears(model)))[0]


def _step(net: Any) -> tuple[torch.Tensor, float]:
    """Gradients of one client's step, (P,) on the CPU, and the seconds that a second one takes."""
    from gpu_step import Shape, Step, synchronize

    step = Step(net, Shape("zero", {"model_type": "llama"}, 4, 16), 1)
    step.trained.copy_(0.05 * torch.randn(step.trained.shape, generator=torch.Generator().manual_seed(3)))
    step.gradients()
    gradient = torch.cat([part.grad[0].double().cpu() for part in step.optimizer.slices[0]])
    started = time.perf_counter()
    step()
    synchronize(net.device.type)
    return gradient, time.perf_counter() - started


def rank(inbox: Any, index: int, ranks: int, folder: str, device: str) -> None:
    """In a process of its own: joins the group, loads its part of the base, takes a step."""
    import torch.distributed as dist

    from actors.zero_rank import ProcessGroup
    from fedtailor.lanes.net import LaneNet
    from fedtailor.models.families import adapted_linears
    from fedtailor.models.zero import base_bytes, load_partitioned

    torch.set_num_threads(1)
    os.environ.update(RANK=str(index), WORLD_SIZE=str(ranks), LOCAL_RANK=str(index if device == "cuda" else 0))
    if device == "cuda":
        torch.cuda.set_device(index)
    store = dist.FileStore(f"{folder}/meeting", ranks)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=index, world_size=ranks, timeout=timedelta(seconds=ZERO_S))
    where = f"cuda:{index}" if device == "cuda" else "cpu"
    model, probe = load_partitioned(
        Path(folder) / "base", "generation", (), torch.float32, ranks, device=where.partition(":")[0]
    )
    net = LaneNet(model, adapted_linears(model), ranks=ProcessGroup(index, ranks), verify=probe.check)
    gradient, seconds = _step(net)
    net.verify()
    inbox.put((index, {"gradient": gradient.numpy(), "seconds": seconds, "bytes": base_bytes(model)}))
