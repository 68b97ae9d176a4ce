"""What the parts of `make bench-gpu` measure: a training step of the platform on random weights, and a card's peak."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from toy import ToyClient, toy_context
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.context import Lane
from fedtailor.lanes.adam import AdamGroup, LaneAdam
from fedtailor.lanes.batches import Examples, make_batch
from fedtailor.lanes.net import LaneNet
from fedtailor.models.dimensions import packaged_config
from fedtailor.models.families import adapted_linears
from fedtailor.models.load import quiet
from fedtailor.training.local import backward, cross_entropy_of

RANK, SCALE, RATE, SEED = 16, 2.0, 1e-3, 7


@dataclass(frozen=True)
class Type:
    """How a step is computed.

    Args:
        name: as in the tables.
        weights: type of the frozen base.
        compute: ``engine.dtype``.
        tf32: float32 products by TensorFloat32 (CUDA only).
    """

    name: str
    weights: torch.dtype = torch.float32
    compute: str = "float32"
    tf32: bool = False

    @property
    def multiplies(self) -> str:
        """Whose peak it is read against: ``float32``, ``tf32`` or ``bfloat16``."""
        return "bfloat16" if self.compute == "bfloat16" else "tf32" if self.tf32 else "float32"


TYPES = {
    kind.name: kind
    for kind in (
        Type("float32"),
        Type("tf32", tf32=True),
        Type("bfloat16", compute="bfloat16"),
        Type("bfloat16, base too", torch.bfloat16, "bfloat16"),
    )
}


@dataclass(frozen=True)
class Shape:
    """A model's sizes and a client's step.

    Args:
        name: as in the tables.
        config: what ``AutoConfig.for_model`` takes, or ``{"packaged": preset}``.
        rows: rows of one client's step.
        tokens: tokens of each row; of a language model's the second half is learned.
        types: which of `TYPES` are worth measuring.
    """

    name: str
    config: Mapping[str, Any] = field(hash=False)
    rows: int
    tokens: int
    types: tuple[str, ...] = tuple(TYPES)

    def sized(self, quick: bool) -> Shape:
        """The shape, or with ``quick`` one with hardly a token."""
        return replace(self, rows=2, tokens=16) if quick else self

    @property
    def talks(self) -> bool:
        """A causal language model."""
        return self.config.get("model_type") != "bert"

    def made(self, quick: bool) -> PretrainedConfig:
        """The config; ``quick``: two blocks of a small width."""
        if preset := self.config.get("packaged"):
            config = packaged_config(preset)
            assert config is not None, preset
        else:
            config = AutoConfig.for_model(**self.config)
        config.pad_token_id = 0
        if quick:
            config.num_hidden_layers, config.vocab_size, config.head_dim = 2, 500, 16
            config.hidden_size, config.intermediate_size = 64, 128
            config.num_attention_heads, config.num_key_value_heads = 4, 2
        return config


_LLAMA: Mapping[str, Any] = {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 2048}
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("encoder", {
            "model_type": "bert", "vocab_size": 30522, "hidden_size": 384, "num_hidden_layers": 6,
            "num_attention_heads": 12, "intermediate_size": 1536, "num_labels": 8,
        }, 8, 64),
        Shape("135M", {
            **_LLAMA, "vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
            "num_key_value_heads": 3, "intermediate_size": 1536,
        }, 4, 128),
        Shape("1B", {
            **_LLAMA, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
            "num_key_value_heads": 8, "intermediate_size": 8192, "head_dim": 64,
        }, 2, 128, ("bfloat16, base too", "tf32")),
        Shape("3B", {"packaged": "llama-3.2-3b"}, 2, 128, ("bfloat16, base too",)),
    )
}  # fmt: skip
"""MiniLM's, SmolLM2-135M's, Llama-3.2-1B's and Llama-3.2-3B's sizes."""


def random_net(shape: Shape, kind: Type, device: str, quick: bool) -> LaneNet:
    """A model of random weights made where it is to be, its linear layers wrapped."""
    auto = AutoModelForCausalLM if shape.talks else AutoModelForSequenceClassification
    devices = [torch.device(device)] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device), quiet():
        torch.manual_seed(SEED)
        model = auto.from_config(shape.made(quick), dtype=kind.weights, trust_remote_code=False)
    return LaneNet(model, adapted_linears(model), kind.compute)


class Step:
    """A training step of K clients as the platform takes it: LoRA on every linear layer, cross-entropy, `LaneAdam`.

    Args:
        net: resident model.
        shape: rows and tokens of a client's step.
        lanes: K.
    """

    def __init__(self, net: LaneNet, shape: Shape, lanes: int) -> None:
        self.net, self.lanes = net, lanes
        group = [_client(shape, number, net.config.vocab_size) for number in range(lanes)]
        self.ctx = toy_context(net, group, LoraAdapter(RANK, SCALE, Scope.SHARED))
        self.batch = make_batch([lane.train for lane in group], [np.arange(shape.rows)] * lanes, 0, net.device)
        names = tuple(spec.name for spec in self.ctx.params.specs)
        self.optimizer = LaneAdam(self.ctx.params, [AdamGroup(names, RATE)])
        self._loss = cross_entropy_of(self.ctx)
        net.train_mode(True)

    @property
    def tokens(self) -> int:
        """Tokens that a step reads."""
        return self.batch.input_ids.numel()

    @property
    def trained(self) -> Tensor:
        """(K, P), the live buffer."""
        return self.ctx.params.flat(Scope.SHARED).detach()

    def gradients(self) -> Tensor:
        """The loss of each lane, (K,); gradients are in place."""
        self.optimizer.zero_grad()
        return backward(self.ctx, self.batch, self._loss)

    def __call__(self) -> Tensor:
        loss = self.gradients()
        self.optimizer.step(self.lanes)
        return loss

    def flops(self) -> float:
        """Floating-point operations of the products of a step, forward and backward, as torch counts what it runs."""
        with FlopCounterMode(display=False) as counter:
            self.gradients()
        return float(counter.get_total_flops())


def _client(shape: Shape, number: int, vocabulary: int) -> Lane:
    rng = numpy_rng("bench-gpu", shape.name, number)
    ids = rng.integers(5, vocabulary, (shape.rows, shape.tokens))
    full = np.full(shape.rows, shape.tokens, np.int64)
    prompts = full // 2 if shape.talks else None
    data = Examples(ids, full, rng.integers(0, 2, shape.rows), prompt_length=prompts)
    client = ToyClient(f"seen/xx/{number:02d}", "seen", "xx", shape.rows, 1)
    return Lane(client, data)  # type: ignore[arg-type]


@contextmanager
def computing(kind: Type) -> Iterator[None]:
    """TensorFloat32 on or off while it lasts."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize(device: str) -> None:
    """Waits for the card."""
    if device == "cuda":
        torch.cuda.synchronize()


def fresh(device: str) -> None:
    """Gives back what is not used, and counts the peak from here."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: str) -> float | None:
    """Most memory that tensors had since `fresh`; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def seconds_each(call: Callable[[], object], device: str, quick: bool) -> float:
    """Median over three blocks of calls, after a warm-up; wall time, the card waited for at the end of a block."""
    least = 0.02 if quick else 0.2
    for _ in range(1 if quick else 3):
        call()
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    count = max(1, min(1000, round(least / max(1e-6, time.perf_counter() - start))))
    blocks = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(count):
            call()
        synchronize(device)
        blocks.append((time.perf_counter() - start) / count)
    return median(blocks)


def matmul_peak(kind: str, device: str, quick: bool) -> float:
    """FLOP/s of a large square product of random numbers in ``float32``, ``tf32`` or ``bfloat16``."""
    size = 256 if quick else 8192 if device == "cuda" else 1024
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with computing(TYPES["tf32" if kind == "tf32" else "float32"]):
        return 2 * size**3 / seconds_each(lambda: torch.mm(a, b, out=out), device, quick)
