"""How the two matrices of a LoRA are drawn before training."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedtailor.core.seeding import torch_rng
from fedtailor.lanes.layers import AdaptedLayer

Start = Literal["lora", "normal_a", "normal", "orthogonal"]
"""A as LoRA draws it and B zero; A N(0, 1) and B zero; both N(0, 1); or as ``normal``, but of a second adapter of the
same layers without what its rows of A and columns of B have in the span of the first one's, so that the row and column
spaces of the two products are orthogonal (PF2LoRA's synthetic task)."""


def initial_a(adapted: AdaptedLayer, rank: int, seed: int, normal: bool = False) -> Tensor:
    """A before training, (rank, d_in) float32: Kaiming-uniform with a = sqrt(5), U(±1/sqrt(d_in)), or N(0, 1).

    The stream is named by (seed, layer) only: every client, round and method starts from the same A, as in the
    FedP2EFT reference, which seeds torch right before it attaches adapters.
    """
    if normal:
        return torch.randn(rank, adapted.d_in, generator=torch_rng(seed, "lora_A", adapted.name))
    bound = 1 / math.sqrt(adapted.d_in)
    draws = torch.rand(rank, adapted.d_in, generator=torch_rng(seed, "lora_A", adapted.name))
    return draws.mul_(2 * bound).sub_(bound)


def started(
    adapted: AdaptedLayer, first: int, last: int, seed: int, start: Start, draw: int
) -> tuple[Tensor, Tensor | None]:
    """Ranks ``first`` to ``last`` of ``draw`` that are drawn: A (r, d_in), and B (d_out, r), None where it is zero."""
    a, b = initial_a(adapted, draw, seed, start != "lora"), None
    if start in ("normal", "orthogonal"):
        b = torch.randn(draw, adapted.d_out, generator=torch_rng(seed, "lora_B", adapted.name))
    parts = [a] if b is None else [a, b]
    own = [rows[first:last] for rows in parts]
    if start == "orthogonal" and first:
        own = [
            mine - mine @ torch.linalg.pinv(rows[:first]) @ rows[:first] for mine, rows in zip(own, parts, strict=True)
        ]
    return own[0], own[1].T if b is not None else None
