"""`make bench-gpu`: does a card compute what the CPU computes? Steps, answers and features first, then every method."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contract_kit import Bench as Kit
from contract_kit import Played, losses, play
from gpu_part import Bench
from gpu_step import SHAPES, TYPES, Shape, Step, computing, random_net
from torch import Tensor
from toy import toy_lanes, toy_llama, toy_net, with_prompts

from fedtailor.core.settings import DecodingConfig
from fedtailor.evaluation.decoding import Decoding, answer
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import METHODS
from fedtailor.storage.artifacts import model_path

TOY = Shape("toy", {"model_type": "bert"}, 4, 9)
TALK = Shape("toy that talks", {"model_type": "llama"}, 4, 9)
LIMITS = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 1e-1}
"""Largest relative difference of gradients from those in float64 on the CPU, by what is multiplied."""
STEPS = 5
FAR = 0.05
"""Relative difference of a method's test losses above which rounding is no excuse."""

_STEPS = "one step against float64 on the CPU, relative differences"


def same(bench: Bench) -> None:
    """Losses and gradients in every type, K lanes against one by one, the same step twice, answers, features."""
    # Before anything is computed: without it cuBLAS may sum in another order each time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    worst = 0.0
    for shape, make in ((TOY, toy_net), (TALK, toy_llama)):
        expected = _gradients(make(torch.float64), shape)
        worst = max(worst, _types(bench, shape, make, expected))
        net = _moved(make(torch.float64), bench.device)
        _report(bench, shape.name, "float64, lanes one by one", _one_by_one(net, shape), expected, LIMITS["float64"])
    if not bench.quick:
        worst = max(worst, _real_shape(bench))
    _twice(bench)
    _answers(bench)
    _features(bench)
    bench.answer(f"float32 gradients are those of float64 on the CPU to {worst:.0e}")


Gradients = tuple[Tensor, Tensor]
"""Losses (K,) and gradients (K, P), float64 on the CPU."""


def _moved(net: LaneNet, device: str) -> LaneNet:
    net.model.to(device)
    return net


def _gradients(net: LaneNet, shape: Shape, lanes: int = 4) -> Gradients:
    step = Step(net, shape, lanes)
    _strengthen(step)
    loss = step.gradients()
    return loss.double().cpu(), _gradient(step)


def _strengthen(step: Step) -> None:
    """B is 0 at first, and with it A's gradient: here it is not, the same on every device."""
    rows = torch.randn(step.trained.shape, generator=torch.Generator().manual_seed(3))
    step.trained.copy_(0.05 * rows)


def _gradient(step: Step) -> Tensor:
    parts = step.ctx.params.slices([spec.name for spec in step.ctx.params.specs])
    return torch.cat([part.grad for part in parts], 1).double().cpu()


def _one_by_one(net: LaneNet, shape: Shape, lanes: int = 4) -> Gradients:
    step = Step(net, shape, lanes)
    _strengthen(step)
    net.state.fused = False
    loss = step.gradients()
    return loss.double().cpu(), _gradient(step)


def _types(bench: Bench, shape: Shape, make: Callable[..., LaneNet], expected: Gradients) -> float:
    """All types on the device; how far float32 is off."""
    off = 0.0
    found = _gradients(_moved(make(torch.float64), bench.device), shape)
    _report(bench, shape.name, "float64", found, expected, LIMITS["float64"] if shape is TOY else LIMITS["float32"])
    for kind in (TYPES["float32"], TYPES["tf32"], TYPES["bfloat16"]):
        if kind.tf32 and bench.device == "cpu":
            continue
        net = _moved(make(torch.float32), bench.device)
        net.compute_type = torch.bfloat16 if kind.compute == "bfloat16" else None
        with computing(kind):
            apart = _report(bench, shape.name, kind.name, _gradients(net, shape), expected, LIMITS[kind.multiplies])
        off = apart if kind.name == "float32" else off
    return off


def _real_shape(bench: Bench) -> float:
    """MiniLM's sizes, the same weights on both sides."""
    shape, kind = replace(SHAPES["encoder"], rows=2, tokens=32), TYPES["float32"]
    here = random_net(shape, kind, "cpu", False)
    expected = _gradients(here, shape)
    found = _gradients(_moved(random_net(shape, kind, "cpu", False), bench.device), shape)
    return _report(bench, "encoder", "float32, CPU in float32", found, expected, LIMITS["float32"])


def _report(bench: Bench, model: str, kind: str, found: Gradients, expected: Gradients, limit: float) -> float:
    loss, gradient = (_apart(a, b) for a, b in zip(found, expected, strict=True))
    good = max(loss, gradient) <= limit  # False of NaN, too
    bench.row(_STEPS, {
        "model": model, "type": kind, "loss": loss, "gradients": gradient, "limit": limit,
        "equal": "yes" if good else "NO",
    })  # fmt: skip
    if not good:
        bench.fail(f"{model} in {kind}: losses differ by {loss:.1e}, gradients by {gradient:.1e} (limit {limit:g})")
    return gradient


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def _twice(bench: Bench) -> None:
    """Is training on this device repeatable to the bit? An answer, no demand."""
    shape = SHAPES["encoder"].sized(bench.quick)
    for sure in (False, True):
        torch.use_deterministic_algorithms(sure, warn_only=True)
        ends = []
        for _ in range(2):
            step = Step(random_net(shape, TYPES["float32"], bench.device, bench.quick), shape, 4)
            for _ in range(STEPS):
                step()
            ends.append(step.trained.cpu().clone())
        how = "torch.use_deterministic_algorithms" if sure else "as the platform runs"
        equal = torch.equal(*ends)
        bench.row("five steps twice", {
            "how": how, "bits": "the same" if equal else "other ones",
            "largest difference": float((ends[0] - ends[1]).abs().max()),
        })  # fmt: skip
    torch.use_deterministic_algorithms(False)


def _answers(bench: Bench) -> None:
    """Greedy decoding of two lanes, in float64: here no rounding may change a token."""
    how = Decoding(DecodingConfig(max_new_tokens=12), stop_ids=(), pad_id=0)
    rng = np.random.default_rng(5)
    prompts = [[rng.integers(5, 100, size) for size in sizes] for sizes in ((4, 7), (3, 9))]
    found = []
    for device in ("cpu", bench.device):
        net = _moved(toy_llama(torch.float64), device)
        step = Step(net, TALK, 2)
        _strengthen(step)
        net.train_mode(False)
        found.append(answer(net, prompts, how))
    _demand(bench, "greedy answers of two lanes", found[0] == found[1], str(found))


def _features(bench: Bench) -> None:
    """What the strategy generator reads of a client."""
    for net, lane in ((toy_net, toy_lanes([6])[0]), (toy_llama, with_prompts(toy_lanes([6]))[0])):
        found = [client_features(_moved(net(torch.float32), d), lane.train, 0).double() for d in ("cpu", bench.device)]
        apart = _apart(found[1], found[0])
        _demand(bench, f"client features of {net.__name__}", apart <= 1e-5, f"apart by {apart:.1e}")


def _demand(bench: Bench, what: str, good: bool, otherwise: str) -> None:
    bench.row("the same as on the CPU", {"what": what, "equal": "yes" if good else f"NO: {otherwise}"})
    if not good:
        bench.fail(f"{what}: {otherwise}")


def methods(bench: Bench) -> None:
    """Two rounds and the personal models of every method, by the platform's worker, on the CPU and on the device."""
    names: Sequence[str] = ("lora", "fedp2eft") if bench.quick else tuple(METHODS)
    equal = 0
    with tempfile.TemporaryDirectory(prefix="bench-gpu") as folder:
        kit = Kit.make(Path(folder))
        _without_dropout(kit)
        engine = kit.exp.engine.model_copy(update={"num_gpus": 1.0 if bench.device == "cuda" else 0.0})
        there = replace(kit, exp=kit.exp.model_copy(update={"engine": engine}), played={})
        for name in names:
            cells: dict[str, Any] = {"method": name}
            with bench.attempt("methods", cells, "note"):
                here = play(METHODS[name], kit)
                apart = _distance(play(METHODS[name], there), here)
                bench.row("methods", {**cells, **apart})
                if not apart["test losses"] <= FAR:
                    bench.fail(f"{name}: test losses differ by {apart['test losses']:.1e}")
                equal += apart["test losses"] <= FAR
    bench.answer(f"{equal} of {len(names)} methods give the CPU's test losses to {100 * FAR:g} %")


def _without_dropout(kit: Kit) -> None:
    """A base that is trained as a whole has its own dropout, which a card draws from another stream."""
    path = kit.root / model_path(kit.model) / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)))


def _distance(found: Played, expected: Played) -> dict[str, float | None]:
    """Largest relative differences of SHARED state and test losses; an error for clients that failed."""
    assert found.made is not None
    assert expected.made is not None
    failed = [f for outcome in found.log.outcomes for f in outcome.failures] + found.made.failures
    if failed:
        raise RuntimeError(f"client {failed[0].client}: {failed[0].reason}")
    a, b = losses(found.made), losses(expected.made)
    shared = None
    if expected.state is not None and found.state is not None and expected.state.shared.size:
        norm = np.linalg.norm(expected.state.shared)
        shared = float(np.linalg.norm(found.state.shared - expected.state.shared) / norm)
    apart = [abs(x - y) / abs(y) for client in b for x, y in zip(a[client], b[client], strict=True)]
    return {"SHARED parameters": shared, "test losses": max(apart)}
