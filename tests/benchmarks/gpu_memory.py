"""`make bench-gpu`: the memory fence. Does a process with a fraction of a card stay inside it, and what does it say?"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from gpu_part import Bench

PIECE = 256 * 2**20
"""Bytes that the fences are filled with at a time."""
FULL = 0.95
"""Share of its fence that every process must get, whatever its neighbours do."""
ANSWER_S = 60.0
CLIENTS = 16


def fence(bench: Bench) -> None:
    """Fences alone, side by side until the card is full, and around the platform's worker."""
    total = torch.cuda.get_device_properties(0).total_memory
    for count, fraction in ((1, 0.25), (2, 0.5), (4, 0.25)):
        cells = {"processes": count, "fraction": fraction}
        with bench.attempt(_FENCES, cells, "note"):
            _side_by_side(bench, count, fraction, total)
    _worker(bench, total)


_FENCES = "filled until torch refuses"


def _side_by_side(bench: Bench, count: int, fraction: float, total: int) -> None:
    """All fill their fences to `FULL`, wait for each other, then ask for more than is theirs."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    before, _ = torch.cuda.mem_get_info()
    for _ in range(count):
        mine, its = context.Pipe()
        process = context.Process(target=fill, args=(its, fraction, total), daemon=True)
        process.start()
        its.close()
        pipes.append(mine)
        processes.append(process)
    try:
        held = [_hear(pipe) for pipe in pipes]
        free, _ = torch.cuda.mem_get_info()
        for pipe in pipes:
            pipe.send("more")
        ends = [_hear(pipe) for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    outside = max(0.0, (before - free - sum(first["held"] for first in held)) / count)
    for first, last in zip(held, ends, strict=True):
        allowed = fraction * total
        whole, inside = first["held"] >= FULL * allowed - PIECE, last["reserved"] <= allowed
        bench.row(_FENCES, {
            "processes": count, "fraction": fraction, "fence, GB": allowed / 1e9, "held, GB": first["held"] / 1e9,
            "most reserved, GB": last["reserved"] / 1e9, "inside": "yes" if inside else "NO",
            "outside torch, GB": outside / 1e9, "goes on after": "yes" if last["alive"] else "NO",
            "what it says": last["said"] or "nothing: it was not refused", "card free, GB": free / 1e9,
        })  # fmt: skip
        if not (inside and last["said"] and last["alive"]):
            bench.fail(f"{count} fences of {fraction:g}: {last}")
        if not whole:
            bench.fail(
                f"{count} fences of {fraction:g}: only {first['held'] / 1e9:.1f} GB of {allowed / 1e9:.1f} to be had"
            )


def fill(pipe: Connection, fraction: float, total: int) -> None:
    """In a process of its own: takes memory inside its fence, then beyond, then a little again."""
    torch.cuda.set_per_process_memory_fraction(fraction)
    held: list[torch.Tensor] = []
    said = _take(held, int(FULL * fraction * total))
    pipe.send({"held": torch.cuda.memory_reserved(), "said": said})
    pipe.recv()
    said = said or _take(held, 2 * total)
    most = torch.cuda.memory_reserved()
    held.clear()
    torch.cuda.empty_cache()
    try:
        alive = float(torch.ones(1024, 1024, device="cuda").sum()) == 1024 * 1024
    except torch.OutOfMemoryError:
        alive = False
    pipe.send({"reserved": most, "said": said, "alive": alive})


def _take(held: list[torch.Tensor], until: int) -> str:
    """Takes pieces until so many bytes are reserved; what torch said if it refused one."""
    while torch.cuda.memory_reserved() + PIECE <= until:
        try:
            held.append(torch.empty(PIECE, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError as error:
            return str(error).split(" If reserved")[0].split(" See documentation")[0]
    return ""


def _hear(pipe: Any) -> Mapping[str, Any]:
    if not pipe.poll(ANSWER_S):
        raise TimeoutError(f"a process said nothing for {ANSWER_S:g} s")
    found: Mapping[str, Any] = pipe.recv()
    return found


def _worker(bench: Bench, total: int) -> None:
    """A segment whose clients fit one by one and not together: the worker must get all of them done, and say why."""
    from gpu_step import fresh
    from job import client_names, stage_spec, write_job
    from regimes import REGIMES

    from fedtailor.core.messages import SegmentJob
    from fedtailor.core.settings import EngineConfig
    from fedtailor.worker.worker import Worker

    regime = replace(
        REGIMES[-1], name="fence", layers=4, sizes=(1, 1), cohort=CLIENTS, population=CLIENTS, rounds=1
    )  # fmt: skip
    engine = EngineConfig(num_gpus=0.5, token_budget=10**6, max_lanes=CLIENTS, backend="serial")
    with tempfile.TemporaryDirectory(prefix="bench-gpu") as folder:
        spec = stage_spec(regime, write_job(regime, Path(folder)), engine)
        names = client_names(regime)
        peaks = {}
        for count in (1, CLIENTS):
            worker = Worker()
            info = worker.open(spec)
            fresh("cuda")
            result = worker.run(SegmentJob(spec.key, 0, 0, names[:count]), info.initial)
            peaks[count] = max(cost.peak_gpu for cost in result.costs.values())
            worker.close()
            del worker, result
        fresh("cuda")
        room = int((peaks[1] + peaks[CLIENTS]) / 2)
        torch.cuda.set_per_process_memory_fraction(room / total)
        worker = Worker()
        info = worker.open(spec)
        result = worker.run(SegmentJob(spec.key, 0, 0, names), info.initial)
    reasons = [str(warning.get("reason", "")) for warning in result.warnings]
    failures = [failure.reason for failure in result.failures]
    bench.row("the platform's worker, a group of clients beyond its fence", {
        "clients": CLIENTS, "alone, GB": peaks[1] / 1e9, "together, GB": peaks[CLIENTS] / 1e9, "fence, GB": room / 1e9,
        "done": len(result.valid), "it says": (reasons + failures + ["nothing"])[0][:400],
    })  # fmt: skip
    bench.answer(f"{len(result.valid)} of {CLIENTS} clients done in a fence that holds some of them at a time")
    if len(result.valid) != CLIENTS:
        bench.fail(f"the worker lost clients: {failures[0] if failures else result}")
    if not any("OutOfMemoryError" in reason for reason in reasons):
        bench.fail("the worker did not say that its memory ran out; was the fence wide enough for all?")
