"""What a process that holds a language model needs, part by part, and how ZeRO divides it among ranks.

Per token and block, autograd keeps about the inputs and outputs of the block's linear layers (for BERT this is
Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models", 2022, to a few percent). With
checkpointing it keeps a block's input, and one block whole while that is computed again. Logits exist at response
tokens only: as computed, in float32, and as gradient. Rows are taken at their longest and all of a row as response, so
real runs need less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Final

from fedtailor.core.settings import DecodingConfig, EngineConfig, ModelConfig, ZeroConfig
from fedtailor.models.dimensions import ModelDimensions
from fedtailor.runs.report.names import locate_module

FLOAT: Final = 4
WEIGHT_BYTES: Final[Mapping[str, float]] = {"float32": 4.0, "bfloat16": 2.0, "8bit": 1.0, "4bit": 0.5}
COMPUTE_BYTES: Final[Mapping[str, int]] = {"float32": 4, "bfloat16": 2}


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
