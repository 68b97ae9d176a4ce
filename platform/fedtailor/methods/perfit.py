"""PerFIT: every client trains a LoRA of more ranks than it may keep, and keeps the parameters that matter to it.

Paper: Zhang, Zhou, Hu, et al., "Personalized Federated Instruction Tuning via Neural Architecture Search" (arXiv
2402.16919), of which no code is public; as a baseline in pFedGPT (Shen et al., EMNLP 2025).
    A, B    -> SHARED    "lora_*" of rank expand * r
    m_k     -> PRIVATE   "mask", (P,) of 1 and 0; all 1 before the client's first round
    score   =  |w dL/dw|, first-order Taylor, on cfg.score_rows rows of the client
A round: a client gets m_k o w, trains it by E epochs with its pruned parameters at 0, and sends it. The server takes
the mean of every parameter over the clients that keep it, see `aggregation.owners`. In a client's first round it trains
the whole space and then prunes it in ``prune_steps`` steps, each to the same share of the one before and with scores of
what is left, until as many numbers are left as a LoRA of rank r has, over all layers together. In the end a client's
model is its mask on what the server has; a client that no round met has all of it. With expand = 1 it is FedAvg.
Ours: that the search follows the training of the round (B is 0 in the beginning, and with it every score); how many
steps it takes; that masks stay what they are (``search=every_round``: found anew each time, as in pFedGPT's launcher).
The bytes counted are those of the numbers kept; the mask itself, a bit a number, is not among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.aggregation.owners import OwnedStep, OwnersMean
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import FlatSlice
from fedtailor.training.epoch_lora import EpochLoraConfig, ReceivedModel
from fedtailor.training.local import Training, backward, cross_entropy_of, step_rows, train

MASK = "mask"


class PerFitConfig(EpochLoraConfig):
    """Training as in pFedGPT's tables; ours where the paper is silent."""

    expand: Positive = 2
    """A client's space has so many times the numbers that it keeps; 1: nothing is pruned."""
    prune_steps: Positive = 5
    score_rows: Positive = 100
    """Rows of a client, drawn anew in each round, whose loss the scores are of; all of them where it has fewer."""
    search: Literal["once", "every_round"] = "once"
    """Whether a client keeps the mask of its first round."""


@dataclass(frozen=True)
class KeptMask:
    """PRIVATE "mask" (P,), one of a method's ``modules``.

    Args:
        adapter: whose P numbers are masked.
        settled: it is what a client's first round made it.
    """

    adapter: LoraAdapter
    settled: bool

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """One number for each of the adapter's, in flat order."""
        return [ParamSpec(MASK, (self._size(net),), Scope.PRIVATE)]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Everything is kept."""
        return {MASK: torch.ones(self._size(net))}

    def _size(self, net: LaneNet) -> int:
        return sum(spec.size for spec in self.adapter.specs(net))


@dataclass(frozen=True)
class OwnMask:
    """The downlink, and the search for what a client keeps."""

    cfg: PerFitConfig
    adapter: LoraAdapter

    def searching(self, ctx: ClientContext) -> Tensor:
        """Clients that look for a mask in this round, (K,) bool."""
        if self.cfg.expand == 1 or ctx.stage == "personalise":
            return torch.zeros_like(ctx.fresh)
        return ctx.fresh if self.cfg.search == "once" else torch.ones_like(ctx.fresh)

    @torch.no_grad()
    def __call__(self, ctx: ClientContext) -> list[int]:
        """Masks what each client was sent, all of it where it will search; how many numbers that leaves."""
        mask = ctx.params[MASK]
        mask[self.searching(ctx)] = 1
        ctx.params.flat(Scope.SHARED).mul_(mask)
        return [int(n) for n in mask.count_nonzero(1)]

    def values(self, ctx: ClientContext) -> FlatSlice:
        """All A and B with their gradients, (K, P) each."""
        [values] = ctx.params.slices(self.adapter.names(ctx.net))
        return values

    @torch.no_grad()
    def prune(self, ctx: ClientContext) -> None:
        """Prunes the trained space of the clients that search, step by step, and keeps their masks."""
        searching, mask, values = self.searching(ctx).unsqueeze(1), ctx.params[MASK].detach(), self.values(ctx).value
        total, steps = mask.shape[1], self.cfg.prune_steps
        for step in range(1, steps + 1):
            kept = round(total * self.cfg.expand ** (-step / steps))
            # Of equal scores the first ones stay; what was pruned never comes back.
            scores = torch.where(mask > 0, self.scores(ctx), -1.0)
            order = scores.argsort(dim=1, descending=True, stable=True)
            found = torch.zeros_like(mask).scatter_(1, order[:, :kept], 1.0)
            mask.copy_(torch.where(searching, found, mask))
            values.mul_(mask)

    def scores(self, ctx: ClientContext) -> Tensor:
        """|w dL/dw| of every number, (K, P), with L the mean over the targets of the rows that are scored."""
        values, most = self.values(ctx), min(ctx.micro_batch or self.cfg.batch_size, self.cfg.batch_size)
        rows = step_rows(ctx, Training(1, self.cfg.score_rows, "score", steps=1))
        values.grad.zero_()
        with torch.enable_grad():
            for batch in ctx.batches(rows):
                backward(replace(ctx, micro_batch=most), batch, cross_entropy_of(ctx))
        return (values.value * values.grad).abs()


@dataclass(frozen=True)
class MaskedEpochs:
    """A round: E epochs on what the client keeps, then the search of those that have not kept anything yet."""

    own: OwnMask

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received parameters, pruned ones at 0."""
        cfg, adapter, mask = self.own.cfg, self.own.adapter, ctx.params[MASK].detach()
        gradients = self.own.values(ctx).grad

        def masked(batch: LaneBatch, step: int) -> None:
            gradients[: batch.lanes].mul_(mask[: batch.lanes])

        groups = [AdamGroup(adapter.names(ctx.net), cfg.lr)]
        trace = train(ctx, groups, cfg.training("train"), after_backward=masked)
        if bool(self.own.searching(ctx).any()):
            self.own.prune(ctx)
        return Report({"train_loss": trace.loss})


def build(cfg: PerFitConfig, r_max: int) -> Method:
    """PerFIT whose clients keep as many numbers as a LoRA of rank ``cfg.rank`` has."""
    adapter = cfg.adapter(cfg.expand * cfg.rank)
    own = OwnMask(cfg, adapter)

    def scored(train: int, pool: int, rounds: float) -> float:
        searches = 0 if cfg.expand == 1 else min(1, rounds) if cfg.search == "once" else rounds
        return searches * cfg.prune_steps * 2 * min(train, cfg.score_rows)

    return Method(
        name="perfit",
        adapter=adapter,
        modules=(KeptMask(adapter, cfg.search == "once"),),
        local_update=MaskedEpochs(own),
        personaliser=ReceivedModel(adapter),
        aggregator=OwnersMean(),
        server=OwnedStep(),
        downlink=own,
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        steps=cfg.local_steps,
        beside=scored,
    )


ENTRY = MethodEntry(
    name="perfit",
    config=PerFitConfig,
    build=build,
    title="PerFIT",
    summary="a LoRA that every client prunes for itself, averaged over who keeps what (Zhang et al. 2024)",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 2, "score_rows": 5, "prune_steps": 2, "dropout": 0.2},
)
