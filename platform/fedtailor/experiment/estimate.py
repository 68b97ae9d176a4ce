"""Costs of one stage from sizes alone: bytes on the wire, memory of a worker or rank, steps and FLOPs.

FLOPs count 2 per weight and token forward, 2 backward for activations and 2 for gradients of what is trained; embedding
tables cost none.

Per token and block, autograd keeps about the inputs and outputs of the block's linear layers (for BERT this is
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, to a few percent). With
checkpointing it keeps a block's input, and one block whole while that is computed again. Logits exist at response
tokens only: as computed, in float32, and as gradient; no more of them at once than `lanes.loss` lets be, but where a
second derivative needs all. Texts are taken at their longest and all of a row as response, so real runs need less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final

from fedtailor.core.settings import DecodingConfig, EngineConfig, ModelConfig, ZeroConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.stages import Stage
from fedtailor.federated.method import Capability, Method
from fedtailor.lanes.loss import WHOLE_LOGITS
from fedtailor.models.dimensions import ModelDimensions
from fedtailor.models.families import locate_module

FLOAT: Final = 4
WEIGHT_BYTES: Final[Mapping[str, float]] = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5}
COMPUTE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Population:
    """The clients; training texts of each, also without the validation pool, the pool's, tests: 0 without the data."""

    seen: int
    unseen: int
    classes: int = 2
    train: tuple[int, ...] = ()
    train_apart: tuple[int, ...] = ()
    train_unseen: tuple[int, ...] = ()
    test: int = 0
    pool: int = 0


@dataclass(frozen=True)
class Estimate:
    """Costs of a stage; None where the data's sizes are needed and missing.

    Args:
        updates: client updates, or clients personalised.
        steps: optimizer steps of single clients.
        tokens: that training steps read, at most: texts at their longest; 0 where nothing is trained.
        flops: floating point operations.
        wire: bytes that the server sends per round; as many come back.
        base: bytes of the resident model.
        trained: bytes of the values of what is trained, over all lanes.
        optimizer: bytes of their gradients and Adam's two moments.
        activations: bytes kept for the backward pass.
        logits: of a language model, bytes of its training logits.
        cache: of a language model, bytes of keys and values while it answers.
    """

    updates: int
    steps: int | None
    tokens: float | None
    flops: float | None
    wire: int
    base: int
    trained: int
    optimizer: int
    activations: int
    logits: int
    cache: int

    @property
    def memory(self) -> int:
        """Bytes of a worker, or of each rank of a group, without Python and its libraries."""
        return self.base + self.trained + self.optimizer + max(self.activations + self.logits, self.cache)


def estimate(
    exp: ExperimentBase,
    stage: Stage,
    method: Method,
    numbers: tuple[int, int],
    dims: ModelDimensions,
    population: Population,
) -> Estimate:
    """Costs of one stage.

    Args:
        exp: whole configuration.
        stage: which stage; ``method``: its method.
        numbers: SHARED numbers, and PRIVATE plus EPHEMERAL ones, per client.
        dims: sizes of the base model.
        population: the clients.
    """
    model, engine, length = exp.model, exp.engine, exp.task.max_length
    personal, talks = stage.kind == "personalise", exp.task_entry.kind == "generation"
    each = len(stage.budgets) if personal and method.personaliser.budgeted else 1
    if personal:
        passes = method.search_epochs + method.budget_epochs * len(stage.budgets)
        pools = exp.personalise.pools
        rows = [n for pool in pools for n in (population.train if pool == "seen" else population.train_unseen)]
        updates = sum(population.seen if pool == "seen" else population.unseen for pool in pools)
        trained, share = dims.adapter_parameters(stage.r_max) if passes else 0, 1.0
    else:
        passes, rows, updates = method.epochs, list(population.train), stage.rounds * stage.cohort
        rows, updates = (rows, updates) if method.pooled == "no" else ([sum(rows)] if rows else [], stage.rounds)
        trained, share = sum(numbers), updates / max(1, len(rows))
    spread = engine.zero.ranks > 1 and engine.zero.stage == 3
    copied = not spread and (model.weights, engine.dtype) == ("float32", "bfloat16")  # `lanes.layers.KeptLinear`
    steps = read = flops = None
    if rows:
        if method.steps is not None and not personal:
            steps = updates * method.steps_in(stage.cohort)
            texts = float(steps * method.batch_size)
        else:
            steps = round(sum(ceil(n / method.batch_size) for n in rows) * share * passes)
            texts = sum(rows) * share * passes
        read, inner = texts * length, dims.parameters - dims.embedding_parameters
        whole = method.adapter is not None and method.adapter.trains_base
        beside = sum(method.beside(n, population.pool, share) for n in rows) if method.beside else 0.0
        scored = population.test * each if personal else beside
        flops = (read * (1 if personal else method.passes) * (6 if whole else 4) + scored * length * 2) * inner
    fitting = engine.token_budget // (method.batch_size * length)
    alone = not method.lanes or model.base_dropout > 0
    # The widest group of lanes at full texts; a client with its budgets is never cut.
    lanes = each if alone else each * max(1, min(engine.max_lanes, fitting) // each)
    lane_rows = min(ceil(method.batch_size / engine.zero.ranks), engine.micro_batch or method.batch_size)
    tokens, whole = lanes * lane_rows * length, Capability.SECOND_ORDER in method.requires and not personal
    return Estimate(
        updates=updates,
        steps=steps,
        tokens=read,
        flops=flops,
        wire=numbers[0] * FLOAT * stage.cohort if method.pooled == "no" else 0,
        base=base_of_rank(dims, model.weights, engine.zero) + 2 * copied * dims.matrices(talks),
        trained=trained * lanes * FLOAT,
        optimizer=optimizer_of_rank(trained * lanes, engine.zero),
        activations=activation_bytes(dims, tokens, model, engine.dtype) if passes else 0,
        logits=logit_bytes(dims, tokens, engine.dtype, whole) if passes and talks else 0,
        cache=cache_bytes(dims, lanes, length, engine, exp.decoding) if personal and talks else 0,
    )


def base_bytes(dims: ModelDimensions, weights: str) -> int:
    """Bytes of the frozen base. 8bit and 4bit are for linear layers but the output embedding, the rest is bfloat16."""
    each = WEIGHT_BYTES[weights]
    inside = sum(d_in * d_out for _, d_in, d_out in dims.all_linears) if each < 2 else 0
    return round(inside * each + (dims.parameters - inside) * max(each, 2.0))


def base_of_rank(dims: ModelDimensions, weights: str, zero: ZeroConfig) -> int:
    """Bytes of the base on one rank: all of it; at stage 3 its part (unless offloaded) and what is gathered at a time:
    the embedding table, or two blocks."""
    whole = base_bytes(dims, weights)
    if zero.ranks == 1 or zero.stage < 3:
        return whole
    blocks = _by_block(dims, lambda d_in, d_out: d_in * d_out)
    gathered = round(max(dims.embedding_parameters, 2 * max(blocks, default=0)) * WEIGHT_BYTES[weights])
    return (0 if zero.offload else ceil(whole / zero.ranks)) + gathered


def optimizer_of_rank(trained: int, zero: ZeroConfig) -> int:
    """Bytes of gradients and both moments of ``trained`` numbers; stages 1 and 2 divide moments, 2 also gradients.

    At stage 3 the adapters lie outside the partition, and every rank has them whole.
    """
    moments, gradients = 2 * FLOAT * trained, FLOAT * trained
    if zero.ranks == 1 or zero.stage == 3:
        return moments + gradients
    return ceil(moments / zero.ranks) + (ceil(gradients / zero.ranks) if zero.stage == 2 else gradients)


def activation_bytes(dims: ModelDimensions, tokens: int, model: ModelConfig, dtype: str) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass, logits aside."""
    blocks = _by_block(dims, lambda d_in, d_out: d_in + d_out)
    inputs = min((d_in for _, d_in, _ in dims.all_linears), default=0)
    kept = inputs * len(blocks) + max(blocks, default=0) if model.checkpointing else sum(blocks)
    return tokens * kept * COMPUTE_BYTES[dtype]


def _by_block(dims: ModelDimensions, size: Callable[[int, int], int]) -> list[int]:
    """Sums over the linear layers of each transformer block."""
    blocks: dict[int | None, int] = {}
    for name, d_in, d_out in dims.all_linears:
        block = locate_module(name)[0]
        blocks[block] = blocks.get(block, 0) + size(d_in, d_out)
    return list(blocks.values())


def logit_bytes(dims: ModelDimensions, tokens: int, dtype: str, whole: bool = False) -> int:
    """Bytes of logits, their float32 log-probabilities and their gradient, every token of every row a response."""
    width = min((d_in for _, d_in, _ in dims.all_linears), default=1)
    logits = tokens * (dims.embedding_parameters // width)  # a language model has one embedding table
    return (logits if whole else min(logits, WHOLE_LOGITS)) * (2 * COMPUTE_BYTES[dtype] + FLOAT)


def cache_bytes(dims: ModelDimensions, lanes: int, length: int, engine: EngineConfig, how: DecodingConfig) -> int:
    """Bytes of keys and values while answers are made; calls keep to the token budget, but a row per lane runs."""
    tokens = max(engine.token_budget, lanes * (length + how.max_new_tokens) * how.beams)
    per_token = sum(d_out for name, _, d_out in dims.all_linears if name.endswith(("k_proj", "v_proj")))
    return tokens * per_token * COMPUTE_BYTES[engine.dtype]
