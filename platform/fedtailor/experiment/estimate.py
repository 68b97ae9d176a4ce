"""Estimate of one stage from sizes alone: bytes on the wire, memory of a worker or rank, steps and FLOPs.

FLOPs count 2 per weight and token forward, 2 backward for activations and 2 for gradients of what is trained; embedding
tables cost none.

Per token and block, autograd keeps about the inputs and outputs of the block's linear layers (for BERT this is
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, to a few percent). With
checkpointing it keeps a block's input, and one block whole while that is computed again. Logits exist at response
tokens only: as computed, in float32, and as gradient. Texts are taken at their longest and all of a row as response, so
real runs need less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from typing import Final

from fedtailor.core.settings import DecodingConfig, EngineConfig, ModelConfig, ZeroConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.stages import Stage
from fedtailor.federated.method import Method
from fedtailor.models.dimensions import ModelDimensions
from fedtailor.models.families import locate_module

FLOAT = 4

WEIGHT_BYTES: Final[Mapping[str, float]] = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5}

COMPUTE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2}

ADAM_STATES = 4
"""Value, gradient and two moments of every trained number."""

SAVED_PER_WIDTH = 68
"""Bytes that autograd keeps per token, layer and unit of width (Korthikanti et al. 2022, in float32)."""


@dataclass(frozen=True)
class Population:
    """The clients; sizes are empty or 0 where the data is not at hand."""

    seen: int
    unseen: int
    classes: int = 2
    train: tuple[int, ...] = ()
    train_unseen: tuple[int, ...] = ()
    test: int = 0
    smallest: int = 0
    middle: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Estimate:
    """Costs of a stage; None where the data's sizes are needed and missing.

    Args:
        updates: client updates, or clients personalised.
        steps: optimizer steps of single clients.
        flops: floating point operations.
        down: bytes sent per round; ``up`` as many come back.
        weights: bytes of the resident model.
        trained: bytes of what is trained, with gradients and moments, over all lanes.
        activations: bytes kept for the backward pass.
        logits: of a language model, bytes of its training logits.
        cache: of a language model, bytes of keys and values while it answers.
        adapters: the part of ``trained`` that is values.
    """

    updates: int
    steps: int | None
    flops: float | None
    down: int
    up: int
    weights: int
    trained: int
    activations: int
    logits: int = 0
    cache: int = 0
    adapters: int = 0

    @property
    def memory(self) -> int:
        """Bytes of a worker, or of each rank of a group, without Python and its libraries."""
        return self.weights + self.trained + max(self.activations + self.logits, self.cache)


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
        stage: which stage.
        method: its method.
        numbers: SHARED numbers, and PRIVATE plus EPHEMERAL ones, per client.
        dims: sizes of the base model.
        population: the clients.
    """
    shared, own = numbers
    wire, fixed = shared * FLOAT * stage.cohort, None
    if stage.kind == "personalise":
        passes = method.search_epochs + method.budget_epochs * len(stage.budgets)
        pools = [population.train if pool == "seen" else population.train_unseen for pool in exp.personalise.pools]
        rows = [n for pool in pools for n in pool]
        updates = sum(population.seen if pool == "seen" else population.unseen for pool in exp.personalise.pools)
        trained, share = dims.adapter_parameters(stage.r_max) if passes else 0, 1.0
    else:
        passes, rows = method.epochs, list(population.train)
        fixed = method.steps
        updates = stage.rounds * stage.cohort
        trained, share = shared + own, updates / max(1, len(rows))
    full = method.adapter is not None and method.adapter.trains_base
    body = dims.parameters - dims.embedding_parameters
    steps = flops = None
    if rows:
        tokens = sum(rows) * share * passes * exp.task.max_length
        steps = round(sum(ceil(n / method.batch_size) for n in rows) * share * passes)
        if fixed is not None:
            steps = updates * fixed
            tokens = float(steps * method.batch_size * exp.task.max_length)
        flops = tokens * (6 if full else 4) * body
        if stage.kind == "personalise":
            lanes = len(stage.budgets) if method.personaliser.budgeted else 1
            flops += 2.0 * population.test * exp.task.max_length * body * lanes
    each = len(stage.budgets) if stage.kind == "personalise" and method.personaliser.budgeted else 1
    lanes = each if not method.lanes or exp.model.base_dropout else _lanes(exp, method, each)
    known = Estimate(
        updates=updates,
        steps=steps,
        flops=flops,
        down=wire,
        up=wire,
        weights=dims.parameters * FLOAT,
        trained=trained * FLOAT * ADAM_STATES * lanes,
        activations=_activations(exp, method, dims, lanes) if passes else 0,
        adapters=trained * FLOAT * lanes,
    )
    return known if exp.task_entry.kind == "classification" else _of_language_model(exp, known, method, dims, lanes)


def _of_language_model(
    exp: ExperimentBase, known: Estimate, method: Method, dims: ModelDimensions, lanes: int
) -> Estimate:
    """The memory of a language model, or of one rank of the group that holds it."""
    model, engine, zero = exp.model, exp.engine, exp.engine.zero
    rows = min(ceil(method.batch_size / zero.ranks), engine.micro_batch or method.batch_size)
    load = Load(lanes, rows, exp.task.max_length)
    trains = known.activations > 0
    answers = known.down == 0  # personalised clients are asked; nothing travels then
    return replace(
        known,
        weights=base_of_rank(dims, model.weights, zero),
        trained=known.adapters + optimizer_of_rank(known.adapters // FLOAT, zero),
        activations=activation_bytes(dims, load, model, engine.dtype) if trains else 0,
        logits=logit_bytes(dims, load, engine.dtype) if trains else 0,
        cache=cache_bytes(dims, lanes, exp.task.max_length, engine, exp.decoding) if answers else 0,
    )


def _lanes(exp: ExperimentBase, method: Method, each: int) -> int:
    """Widest lane group at full texts; a client with its budgets is never cut."""
    fitting = exp.engine.token_budget // (method.batch_size * exp.task.max_length)
    return each * max(1, min(exp.engine.max_lanes, fitting) // each)


def _activations(exp: ExperimentBase, method: Method, dims: ModelDimensions, lanes: int) -> int:
    """Linear in tokens; attention maps, quadratic in length, are left out."""
    tokens = lanes * method.batch_size * exp.task.max_length
    widths = [d_in for _, d_in, _ in dims.linears]
    blocks = max(1, round(len(widths) / 6))  # query, key, value, output and two of the feed-forward part
    return tokens * min(widths, default=0) * SAVED_PER_WIDTH * blocks


@dataclass(frozen=True)
class Load:
    """What one pass carries.

    Args:
        lanes: models side by side.
        rows: of each lane in one forward pass.
        length: tokens of a row.
    """

    lanes: int
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Of the whole pass."""
        return self.lanes * self.rows * self.length


def base_bytes(dims: ModelDimensions, weights: str) -> int:
    """Bytes of the frozen base. 8bit and 4bit are for the adapted linear layers; the rest is bfloat16 then."""
    each = WEIGHT_BYTES[weights]
    inside = sum(d_in * d_out for _, d_in, d_out in dims.linears) if each < 2 else 0
    return round(inside * each + (dims.parameters - inside) * max(each, 2.0))


def activation_bytes(dims: ModelDimensions, load: Load, model: ModelConfig, dtype: str) -> int:
    """Bytes that autograd keeps for the backward pass of one forward pass, logits aside."""
    blocks: dict[int | None, int] = {}
    for name, d_in, d_out in dims.linears:
        block = locate_module(name)[0]
        blocks[block] = blocks.get(block, 0) + d_in + d_out
    widest, inputs = max(blocks.values(), default=0), min((d_in for _, d_in, _ in dims.linears), default=0)
    kept = inputs * len(blocks) + widest if model.checkpointing else sum(blocks.values())
    return load.tokens * kept * COMPUTE_BYTES[dtype]


def logit_bytes(dims: ModelDimensions, load: Load, dtype: str) -> int:
    """Bytes of logits, their float32 log-probabilities and their gradient, every token of every row a response."""
    return load.tokens * vocabulary(dims) * (2 * COMPUTE_BYTES[dtype] + FLOAT)


def vocabulary(dims: ModelDimensions) -> int:
    """Rows of the embedding table, of which a language model has one."""
    width = min((d_in for _, d_in, _ in dims.linears), default=1)
    return dims.embedding_parameters // width


def cache_bytes(dims: ModelDimensions, lanes: int, length: int, engine: EngineConfig, how: DecodingConfig) -> int:
    """Bytes of keys and values while answers are made; calls keep to the token budget, but a row per lane runs."""
    tokens = max(engine.token_budget, lanes * (length + how.max_new_tokens) * how.beams)
    per_token = sum(d_out for name, _, d_out in dims.linears if name.endswith(("k_proj", "v_proj")))
    return tokens * per_token * COMPUTE_BYTES[engine.dtype]


def gathered_bytes(dims: ModelDimensions, weights: str) -> int:
    """Bytes of what stage 3 brings together at a time: the embedding table, or two blocks."""
    blocks: dict[int | None, int] = {}
    for name, d_in, d_out in dims.linears:
        block = locate_module(name)[0]
        blocks[block] = blocks.get(block, 0) + d_in * d_out
    return round(max(dims.embedding_parameters, 2 * max(blocks.values(), default=0)) * WEIGHT_BYTES[weights])


def base_of_rank(dims: ModelDimensions, weights: str, zero: ZeroConfig) -> int:
    """Bytes of the base on one rank: all of it; at stage 3 its part (unless offloaded) and what is gathered."""
    whole = base_bytes(dims, weights)
    if zero.ranks == 1 or zero.stage < 3:
        return whole
    return (0 if zero.offload else ceil(whole / zero.ranks)) + gathered_bytes(dims, weights)


def optimizer_of_rank(trained: int, zero: ZeroConfig) -> int:
    """Bytes of gradients and both moments of ``trained`` numbers; stages 1 and 2 divide moments, 2 also gradients.

    At stage 3 the adapters lie outside the partition, and every rank has them whole.
    """
    moments, gradients = 2 * FLOAT * trained, FLOAT * trained
    n = zero.ranks
    if n == 1 or zero.stage == 3:
        return moments + gradients
    return ceil(moments / n) + (ceil(gradients / n) if zero.stage == 2 else gradients)
