"""`make bench-gpu`: fractions as plain processes, 1, 2 and 4 of them on one card, against lanes in one process."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from gpu_part import Bench
from gpu_step import SHAPES, TYPES, Step, fresh, random_net, synchronize

START_S, ANSWER_S = 120.0, 60.0
KIND = TYPES["bfloat16"]
WHOLE = ((1, 1), (2, 1), (4, 1), (1, 4), (2, 4), (4, 4), (1, 16))
QUICK = ((1, 1), (2, 1), (1, 2))
"""Processes and lanes of each."""


def shares(bench: Bench) -> None:
    """Tokens a second of all processes together, while all of them are at work."""
    ways, names = (QUICK, ("encoder",)) if bench.quick else (WHOLE, ("encoder", "135M"))
    count = max(processes for processes, _ in ways)
    seconds = 0.2 if bench.quick else 1.5
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []
    workers = []
    for _ in range(count):
        mine, its = context.Pipe()
        workers.append(context.Process(target=work, args=(its, bench.device, bench.quick), daemon=True))
        workers[-1].start()
        its.close()
        pipes.append(mine)
    try:
        for pipe in pipes:
            _hear(pipe, START_S)
        for name in names:
            _table(bench, pipes, name, ways, seconds)
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _table(bench: Bench, pipes: list[Any], name: str, ways: Any, seconds: float) -> None:
    rates: dict[tuple[int, int], float] = {}
    for processes, lanes in ways:
        cells = {"shape": name, "processes": processes, "lanes each": lanes}
        if bench.left < 5 and not bench.quick:
            bench.row(_TITLE, {**cells, "note": "no time was left"})
            continue
        with bench.attempt(_TITLE, cells, "note"):
            answers = _together(pipes[:processes], (name, lanes, 1 / processes, seconds))
            rate = rates[processes, lanes] = sum(tokens / s for tokens, s, _ in answers)
            bench.row(_TITLE, {
                **cells, "tokens/s": rate, "to 1 process": rate / next(iter(rates.values())),
                "memory of the largest, GB": max(memory for _, _, memory in answers) / 1e9 or None,
            })  # fmt: skip
    several = [key for key in rates if key[0] > 1]
    single = [key for key in rates if key[0] == 1]
    if several and single:
        most, alone = max(several, key=rates.__getitem__), max(single, key=rates.__getitem__)
        bench.answer(
            f"{name}: {most[0]} processes of {most[1]} lanes reach {rates[most] / rates[alone]:.2f}x of one process "
            f"with {alone[1]} lanes"
        )


_TITLE = "together, bfloat16"


def _together(pipes: list[Any], order: tuple[str, int, float, float]) -> list[tuple[int, float, int]]:
    """All are ready before any begins."""
    for pipe in pipes:
        pipe.send(order)
    for pipe in pipes:
        _hear(pipe, ANSWER_S)
    for pipe in pipes:
        pipe.send("go")
    return [_hear(pipe, ANSWER_S) for pipe in pipes]


def _hear(pipe: Any, limit: float) -> Any:
    if not pipe.poll(limit):
        raise TimeoutError(f"a process said nothing for {limit:g} s")
    found = pipe.recv()
    if isinstance(found, Exception):
        raise found
    return found


def work(pipe: Connection, device: str, quick: bool) -> None:
    """In a process of its own: makes ready what it is told, waits for the word, and counts its tokens.

    What it cannot do is its answer, so that the others do not wait for it.
    """
    torch.set_num_threads(1)
    synchronize(device)
    nets: dict[str, Any] = {}
    pipe.send("up")
    while True:
        name, lanes, fraction, seconds = pipe.recv()
        try:
            fresh(device)
            if device == "cuda":
                torch.cuda.set_per_process_memory_fraction(float(fraction))
            if name not in nets:
                nets = {name: random_net(SHAPES[name], KIND, device, quick)}
            nets[name].unbind()
            step = Step(nets[name], SHAPES[name].sized(quick), lanes)
            for _ in range(1 if quick else 3):
                step()
            synchronize(device)
            pipe.send("ready")
            pipe.recv()
            pipe.send(_count(step, device, seconds))
            del step
        except Exception as error:
            pipe.send(error)


def _count(step: Step, device: str, seconds: float) -> tuple[int, float, int]:
    """Tokens, seconds, and bytes at most."""
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(4):
            step()
            steps += 1
        synchronize(device)
    used = time.perf_counter() - start
    return steps * step.tokens, used, torch.cuda.max_memory_allocated() if device == "cuda" else 0
