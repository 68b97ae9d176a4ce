"""`make bench-gpu`: a card's peak, lanes against it, and what CUDA graphs and compilation add."""

from __future__ import annotations

import time
from typing import Any

import torch
from gpu_part import Bench
from gpu_step import (
    SHAPES,
    TYPES,
    Shape,
    Step,
    Type,
    computing,
    fresh,
    matmul_peak,
    peak_gb,
    random_net,
    seconds_each,
    synchronize,
)

LANES = (1, 2, 4, 8, 16, 32, 64)
LONGEST_S = 3.0
"""A step that took longer is not tried with more lanes."""
ENOUGH_S = 8.0
"""With less time left nothing new is begun."""
CLOSE = {"float32": 1e-3, "tf32": 1e-2, "bfloat16": 5e-2}
"""Largest relative difference of trained parameters after a few steps that another order of operations explains."""


def peak(bench: Bench) -> None:
    """What the card can do at most."""
    kinds = ("float32", "tf32", "bfloat16") if bench.device == "cuda" else ("float32", "bfloat16")
    found = {}
    for kind in kinds:
        found[kind] = matmul_peak(kind, bench.device, bench.quick)
        bench.row("a large square product", {"type": kind, "TFLOP/s": found[kind] / 1e12})
    numbers = 2**20 if bench.quick else 2**28 if bench.device == "cuda" else 2**24
    source = torch.randn(numbers, device=bench.device)
    target = torch.empty_like(source)
    copied = 2 * 4 * numbers / seconds_each(lambda: target.copy_(source), bench.device, bench.quick)
    small = torch.zeros(16, device=bench.device)
    launch = seconds_each(lambda: small.add_(1), bench.device, bench.quick)
    bench.row("other limits", {"what": "copy, read and written", "measured": f"{copied / 1e9:,.0f} GB/s"})
    bench.row(
        "other limits", {"what": "the smallest operation, begun from Python", "measured": f"{launch * 1e6:.1f} us"}
    )
    products = ", ".join(f"{kind} {value / 1e12:,.1f}" for kind, value in found.items())
    bench.answer(f"{products} TFLOP/s; copies at {copied / 1e9:,.0f} GB/s; {launch * 1e6:.1f} us to begin an operation")


def lanes(bench: Bench, name: str) -> None:
    """Steps of 1 to 64 clients at once, in every type."""
    shape, best = SHAPES[name].sized(bench.quick), []
    for kind in (TYPES[name] for name in shape.types):
        if kind.tf32 and bench.device == "cpu":
            continue
        cells = {"type": kind.name}
        with bench.attempt(_TABLE, cells, "note"), computing(kind):
            if ratio := _ladder(bench, shape, kind):
                best.append(ratio)
    if best:
        bench.answer("; ".join(best))


_TABLE = "training steps (LoRA, r = 16)"


def _ladder(bench: Bench, shape: Shape, kind: Type) -> str:
    """One type, lanes doubling until memory, a slow step or the deadline ends it; what was best, in words."""
    fresh(bench.device)
    top = matmul_peak(kind.multiplies, bench.device, bench.quick)
    net = random_net(shape, kind, bench.device, bench.quick)
    first, flops, best = 0.0, 0.0, ("", 0.0)
    for count in LANES[:3] if bench.quick else LANES:
        cells: dict[str, Any] = {"type": kind.name, "lanes": count}
        if bench.left < ENOUGH_S and not bench.quick:
            bench.row(_TABLE, {**cells, "note": "not measured: no time was left"})
            break
        net.unbind()
        fresh(bench.device)
        each, step = None, None
        with bench.attempt(_TABLE, cells, "note"):
            step = Step(net, shape, count)
            flops = flops or step.flops()  # of one lane, since the first count is 1
            each = seconds_each(step, bench.device, bench.quick)
            rate = step.tokens / each
            first = first or rate
            bench.row(_TABLE, {
                **cells, "tokens": step.tokens, "ms a step": 1e3 * each, "tokens/s": rate, "to 1 lane": rate / first,
                "TFLOP/s": count * flops / each / 1e12, "% of peak": 100 * count * flops / each / top,
                "memory, GB": peak_gb(bench.device),
            })  # fmt: skip
            if rate > best[1]:
                share = 100 * count * flops / each / top
                best = (f"{kind.name}: {rate / first:.1f}x at {count} lanes, {share:.0f} % of peak", rate)
        del step
        if each is None or each > LONGEST_S:
            break
    return best[0]


def graphs(bench: Bench) -> None:
    """The same step eagerly, as a CUDA graph, and with its blocks compiled."""
    sizes = [("encoder", 2)] if bench.quick else [("encoder", 1), ("encoder", 8), ("135M", 1), ("135M", 8)]
    gains: list[str] = []
    for kind in (TYPES["bfloat16"],) if bench.quick else (TYPES["bfloat16"], TYPES["float32"]):
        for name, count in sizes:
            if bench.left < ENOUGH_S:
                bench.row(_WAYS, {"shape": name, "lanes": count, "type": kind.name, "note": "no time was left"})
                return
            gains += _ways(bench, SHAPES[name].sized(bench.quick), count, kind)
    if gains:
        bench.answer("; ".join(gains))


_WAYS = "one step, three ways"


def _ways(bench: Bench, shape: Shape, count: int, kind: Type) -> list[str]:
    cells = {"shape": shape.name, "lanes": count, "type": kind.name}
    fresh(bench.device)
    net = random_net(shape, kind, bench.device, bench.quick)
    eager, gains = None, []
    ways = {"eager": _eager, "CUDA graph": _graph, "compiled": _compiled}
    if bench.device == "cpu":
        del ways["CUDA graph"]
    if kind.name != "bfloat16":
        del ways["compiled"]  # the cost of compilation buys one type only
    for way, measure in ways.items():
        own = {**cells, "way": way}
        if way == "compiled" and bench.left < (5 if bench.quick else 30):
            bench.row(_WAYS, {**own, "note": "no time was left to compile"})
            continue
        with bench.attempt(_WAYS, own, "note"), computing(kind):
            net.unbind()
            each, build, apart = measure(bench, net, shape, count)
            eager = eager or each
            bench.row(_WAYS, {
                **own, "ms a step": 1e3 * each, "to eager": eager / each, "to make, s": build, "difference": apart,
            })  # fmt: skip
            if apart is not None and not apart <= CLOSE[kind.multiplies]:
                bench.fail(f"{way}, {shape.name}, {count} lanes: trained parameters differ by {apart:.1e} from eager")
            if way != "eager":
                gains.append(f"{way} {eager / each:.2f}x ({shape.name}, {count} lanes, {kind.name})")
    return gains


Way = tuple[float, float | None, float | None]
"""Seconds a step, seconds to make it, relative difference of the trained parameters from eager ones."""


def _eager(bench: Bench, net: Any, shape: Shape, count: int) -> Way:
    return seconds_each(Step(net, shape, count), bench.device, bench.quick), None, None


def _graph(bench: Bench, net: Any, shape: Shape, count: int) -> Way:
    """Captures one whole step, optimizer included, and replays it."""
    expected = _trained(Step(net, shape, count), 6)
    net.unbind()
    step, started = Step(net, shape, count), time.perf_counter()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at first use must not be made while recording
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records and does not run
        step()
    build = time.perf_counter() - started
    for _ in range(3):
        graph.replay()
    apart = _apart(step.trained.clone(), expected)
    each = seconds_each(graph.replay, bench.device, bench.quick)
    graph.reset()
    return each, build, apart


def _compiled(bench: Bench, net: Any, shape: Shape, count: int) -> Way:
    """Compiles the blocks, which are alike, one by one."""
    expected = _trained(Step(net, shape, count), 4)
    net.unbind()
    body = net.model.base_model
    blocks = body.layers if shape.talks else body.encoder.layer
    torch._dynamo.reset()
    try:
        for block in blocks:
            # On a CPU without the C++ compiler, which takes longer than all other parts.
            block.compile(dynamic=False, backend="inductor" if bench.device == "cuda" else "aot_eager")
        step, started = Step(net, shape, count), time.perf_counter()
        apart = _apart(_trained(step, 4), expected)
        build = time.perf_counter() - started
        return seconds_each(step, bench.device, bench.quick), build, apart
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def _trained(step: Step, steps: int) -> torch.Tensor:
    for _ in range(steps):
        step()
    synchronize(step.net.device.type)
    return step.trained.clone()


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Length of the difference by that of what is expected; NaN stays NaN."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
