"""``engine.dtype=auto`` and ``model.attention=auto``: what this machine trains this model fastest with.

A training step of the model's first blocks, with random weights and adapters of rank 8, is timed with every choice. The
result is kept in the node's cache, by machine, versions and shapes, and the run's configuration holds what was chosen,
so that a run which goes on elsewhere goes on in the same numbers.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import transformers
from torch.nn import functional
from transformers import PretrainedConfig

from fedtailor.core.errors import ConfigError
from fedtailor.core.files import cache_root
from fedtailor.experiment.config import ExperimentBase
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.models.dimensions import model_config
from fedtailor.models.families import adapted_linears, untrained
from fedtailor.models.load import model_errors, name_labels, quiet
from fedtailor.models.source import EMBEDDED_KINDS
from fedtailor.storage.files import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO: Final = "auto"
WORTH = 1.3
"""Least gain over float32 with the usual kernel for which another choice is made: it must not flip between runs."""

_BLOCKS, _TOKENS, _RANK, _REPEATS = 2, 512, 8, 3
"""Blocks that are timed, tokens of a step, rank of its adapters; the fastest of so many repetitions counts."""

LARGEST_MEASURED = 500_000_000
"""Parameters of a model up to which `unasked` measures."""

Choice = tuple[str, str | None]
"""Compute type, attention kernel (None: transformers' choice)."""


@dataclass(frozen=True)
class Fastest:
    """What was chosen, and what it gains.

    Args:
        dtype: compute type.
        attention: kernel; None: transformers' choice.
        gain: how many times as fast as the first candidate.
    """

    dtype: str
    attention: str | None
    gain: float

    def __str__(self) -> str:
        kernel = f" with {self.attention} attention" if self.attention else ""
        gain = "" if self.gain == 1 else f": {self.gain:.1f} times as fast here as the usual choice"
        return f"{self.dtype}{kernel}{gain}"


def settled(
    exp: ExperimentBase, run_id: str | None = None, notice: Callable[[str], None] = lambda _: None
) -> tuple[ExperimentBase, Fastest | None]:
    """The experiment with a compute type and a kernel in the place of ``auto``; as it is where it asks for neither.

    bfloat16 on a GPU that has no instructions for it becomes float32, and ``notice`` says so. Every CPU can compute in
    it, if slowly.

    Args:
        exp: checked configuration.
        run_id: of the run to be; if it exists already, what it was begun with counts in the place of ``auto``.
        notice: shows a sentence.

    Raises:
        ConfigError: it asks to compute on a GPU, and this machine has none to measure; or it keeps its base in a type
            that needs bfloat16, and the GPU lacks it.
        ModelError: no config of the model is to be had, or it cannot be made with a kernel.
    """
    if exp.engine.dtype == "bfloat16" and not _has_bfloat16(exp.engine.device):
        card = torch.cuda.get_device_name()
        if exp.model.weights != "float32":
            raise ConfigError(
                f"'model.weights': {exp.model.weights} is computed in bfloat16, for which the GPU here ({card}) has no "
                "instructions (allowed: float32)"
            )
        notice(f"engine.dtype=bfloat16: the GPU here ({card}) has no instructions for it, so float32 is used")
        exp = exp.model_copy(update={"engine": exp.engine.model_copy(update={"dtype": "float32"})})
    if AUTO not in (exp.engine.dtype, exp.model.attention):
        return exp, None
    storage, found = Storage(exp.storage), None
    if run_id is not None and storage.exists(f"{run_id}/run.json"):
        config = storage.read_json(f"{run_id}/run.json")["config"]
        dtype, attention = (
            config["engine"].get("dtype", "float32"),
            config["model"].get("attention"),
        )  # old runs lack them
    else:
        found = fastest(exp)
        dtype, attention = found.dtype, found.attention
    engine = exp.engine.model_copy(update={"dtype": dtype if exp.engine.dtype == AUTO else exp.engine.dtype})
    kernel = attention if exp.model.attention == AUTO else exp.model.attention
    return exp.model_copy(update={"engine": engine, "model": exp.model.model_copy(update={"attention": kernel})}), found


def unasked(exp: ExperimentBase, parameters: int) -> Fastest | None:
    """What ``auto`` would choose for an experiment that does not ask for it; None: nothing else than the usual.

    Args:
        exp: checked configuration.
        parameters: of its model. Embedded models are not measured, since nothing is gained on them, nor are large ones
            or those that go to a GPU, since that takes long or another machine.
    """
    usual = exp.engine.dtype == "float32" and exp.model.attention is None and exp.engine.device == "cpu"
    if not usual or exp.model.name in EMBEDDED_KINDS or parameters > LARGEST_MEASURED:
        return None
    found = fastest(
        exp.model_copy(
            update={
                "engine": exp.engine.model_copy(update={"dtype": AUTO}),
                "model": exp.model.model_copy(update={"attention": AUTO}),
            }
        )
    )
    return found if found.gain >= WORTH else None


def candidates(exp: ExperimentBase) -> list[Choice]:
    """What may be chosen, the usual first."""
    dtypes = [exp.engine.dtype]
    if exp.engine.dtype == AUTO:
        dtypes = ["float32", "bfloat16"] if _has_bfloat16(exp.engine.device) else ["float32"]
    kernels = [None, "eager"] if exp.model.attention == AUTO else [exp.model.attention]
    return [(dtype, kernel) for dtype in dtypes for kernel in kernels]


def fastest(exp: ExperimentBase) -> Fastest:
    """The candidate that trains fastest on this machine, or the first where none is worth it. Raises: see `settled`."""
    device = exp.engine.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "'engine.dtype' or 'model.attention' is auto, which is measured where the run starts, and this machine has "
            "no GPU: name them, e.g. engine.dtype=bfloat16 model.attention=sdpa"
        )
    config = _first_blocks(model_config(exp.model, exp.task.max_length))
    tokens, choices = min(exp.task.max_length, _TOKENS), candidates(exp)
    machine = torch.cuda.get_device_name() if device == "cuda" else _processor()
    shapes = [config.to_json_string(), exp.task_entry.kind, str(exp.model.targets), tokens, exp.engine.threads]
    key = json.dumps([machine, torch.__version__, transformers.__version__, shapes, choices])
    kept, name = Storage(cache_root() / "fastest"), f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if kept.exists(name):
        seconds = kept.read_json(name)["seconds"]
    else:
        seconds = [_step_seconds(exp, config, choice, tokens) for choice in choices]
        kept.write_json(name, {"machine": machine, "choices": choices, "tokens": tokens, "seconds": seconds})
    best = min(range(len(choices)), key=seconds.__getitem__)
    best = best if seconds[0] >= WORTH * seconds[best] else 0
    return Fastest(*choices[best], seconds[0] / seconds[best])


def _has_bfloat16(device: str) -> bool:
    """Whether to compute in it here; True also where the GPU is on another machine."""
    if device != "cuda" or not torch.cuda.is_available():
        return True
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "CPU part"))))


def _first_blocks(config: PretrainedConfig) -> PretrainedConfig:
    """A copy with `_BLOCKS` blocks, where the architecture says their number in the usual way."""
    found = copy.deepcopy(config)
    if getattr(found, "num_hidden_layers", 0) > _BLOCKS:
        found.num_hidden_layers = _BLOCKS
        for name in ("layer_types", "no_rope_layers"):
            if isinstance(getattr(found, name, None), list):
                setattr(found, name, getattr(found, name)[:_BLOCKS])
    return found


def _step_seconds(exp: ExperimentBase, config: PretrainedConfig, choice: Choice, tokens: int) -> float:
    """Seconds of one forward and backward pass, the adapters' gradients included."""
    dtype, attention = choice
    device = torch.device(exp.engine.device)
    with _threads(exp.engine.threads), torch.random.fork_rng(devices=[]), quiet():
        model = _random_model(exp, config, attention).to(device)  # type: ignore[arg-type]
        net = LaneNet(model, adapted_linears(model, exp.model.targets), dtype)
        parameters = _bind(net)
        rows = max(1, _TOKENS // tokens)
        ids = torch.randint(int(config.get_text_config().vocab_size), (1, rows, tokens), device=device)
        labels = torch.zeros(1, rows, dtype=torch.int64, device=device)
        batch = LaneBatch(ids, torch.ones_like(ids), labels, labels.bool(), ((rows, tokens),))
        net.train_mode(True)

        def step() -> None:
            scores = net.logits(batch)[0]
            loss = functional.cross_entropy(scores, torch.zeros(len(scores), dtype=torch.int64, device=device))
            torch.autograd.grad(loss, parameters, allow_unused=True)

        return _fastest_of(step, device)


def _random_model(exp: ExperimentBase, config: PretrainedConfig, attention: str | None) -> PreTrainedModel:
    config = copy.deepcopy(config)
    if exp.task_entry.kind in ("classification", "extraction"):
        name_labels(config, ["a", "b"])
    config.pad_token_id = 0
    options = {"attn_implementation": attention} if attention else {}
    with model_errors(f"model={exp.model.name}", f"it with {attention or 'its usual'} attention"):
        return untrained(config, exp.task_entry.kind, **options)


def _bind(net: LaneNet) -> list[torch.Tensor]:
    parameters = []
    for layer, adapted in zip(net.layers, net.adapted, strict=True):
        a = torch.randn(1, _RANK, adapted.d_in, device=net.device).requires_grad_()
        b = torch.zeros(1, adapted.d_out, _RANK, device=net.device).requires_grad_()
        layer.bind(a, b, None, 1.0)
        parameters += [a, b]
    return parameters


def _fastest_of(step: Callable[[], None], device: torch.device) -> float:
    """CPU time where one thread computes, which other work on the machine hardly changes; else wall time."""
    on_gpu = device.type == "cuda"
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    times = []
    for _ in range(_REPEATS + 1):  # the first one warms up
        start = clock()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(clock() - start)
    return min(times[1:])


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
