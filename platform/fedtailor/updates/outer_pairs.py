"""The outer batch of a hypergradient: pairs of one training and one validation text, many in one pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter, lora_names
from fedtailor.core.batches import Examples, IntArray, LaneBatch, make_batch
from fedtailor.core.context import ClientContext
from fedtailor.core.lanes import LaneParams
from fedtailor.core.seeding import numpy_rng
from fedtailor.updates.hypergradient import HypergradientConfig, cotangent


def cycled(size: int, count: int, rng: np.random.Generator) -> IntArray:
    """``count`` row numbers below ``size``: pass after pass over all rows, each in another order."""
    passes = [rng.permutation(size) for _ in range(math.ceil(count / size))]
    return np.concatenate(passes)[:count]


@dataclass(frozen=True)
class OuterPairs:
    """The pairs of every lane and outer step.

    Args:
        ctx: lanes with their training texts, LoRA in ``ctx.params``.
        validation: texts held out, by lane.
        train_rows: rows of training texts, (K, steps, pairs).
        validation_rows: rows of validation texts, (K, steps, pairs).
    """

    ctx: ClientContext
    validation: Sequence[Examples]
    train_rows: IntArray
    validation_rows: IntArray

    @classmethod
    def draw(cls, ctx: ClientContext, validation: Sequence[Examples], steps: int, pairs: int) -> OuterPairs:
        """Named by (seed, stage, round, client): no text is drawn again before all of its side were drawn."""
        drawn = []
        for side, sizes in (
            ("train", [lane.size for lane in ctx.lanes]),
            ("validation", [len(v.labels) for v in validation]),
        ):
            rows = [
                cycled(size, steps * pairs, numpy_rng(ctx.seed, ctx.stage, ctx.round, lane.client.id, f"pairs/{side}"))
                for lane, size in zip(ctx.lanes, sizes, strict=True)
            ]
            drawn.append(np.stack(rows).reshape(len(rows), steps, pairs))
        return cls(ctx, validation, drawn[0], drawn[1])

    def cotangents(self, adapter: LoraAdapter, step: int, cfg: HypergradientConfig) -> list[Tensor]:
        """Means over a step's pairs of `hypergradient.cotangent` at the weights in ``ctx.params``.

        Args:
            adapter: binds A and B; bound to ``ctx.params`` again afterwards.
            step: outer step.
            cfg: Q, psi and switches.

        Returns:
            One tensor (K, *shape) for A and B of each layer in turn.
        """
        net, lanes = self.ctx.net, len(self.ctx.lanes)
        names = lora_names(net)
        sums: list[Tensor] = []
        for start in range(0, cfg.pairs, cfg.at_once):
            chosen = slice(start, min(start + cfg.at_once, cfg.pairs))
            each = chosen.stop - start
            wide = self._copies(adapter, each)
            train = self._batch([lane.train for lane in self.ctx.lanes], self.train_rows[:, step, chosen])
            validation = self._batch(self.validation, self.validation_rows[:, step, chosen])
            found = cotangent(net.logits, [wide[name] for name in names], train, validation, cfg)
            parts = [t.view(lanes, each, *t.shape[1:]).sum(1) for t in found]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        adapter.bind(net, self.ctx.params)
        net.place([lane.client.id for lane in self.ctx.lanes])
        return [total / cfg.pairs for total in sums]

    def _batch(self, examples: Sequence[Examples], rows: IntArray) -> LaneBatch:
        """Every pair is a lane of its own with one text; rows (K, each)."""
        repeated = [e for e in examples for _ in range(rows.shape[1])]
        return make_batch(repeated, list(rows.reshape(-1, 1)), self.ctx.pad_id, self.ctx.net.device)

    @torch.no_grad()
    def _copies(self, adapter: LoraAdapter, each: int) -> LaneParams:
        """A and B of every client ``each`` times, as leaves, bound to the model."""
        net, own = self.ctx.net, self.ctx.params
        wide = LaneParams(adapter.specs(net), each * own.lanes, net.device, net.param_dtype, trained=False)
        for name in lora_names(net):
            wide.set(name, own[name].repeat_interleave(each, 0))
            wide[name].requires_grad_()
        adapter.bind(net, wide)
        net.place([lane.client.id for lane in self.ctx.lanes for _ in range(each)])
        return wide
