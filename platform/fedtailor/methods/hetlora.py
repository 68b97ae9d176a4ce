"""HETLoRA: one LoRA on the server, of which every client has as many ranks as suit it, and prunes those it can spare.

Papers: Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024 (arXiv 2401.06432), section 3.2; as a baseline in Hao et al. (PF2LoRA, arXiv 2503.03920), sections 3 and 6.
    A, B (and the head)  -> SHARED    "lora_*" of rank r_max, the head's own weights
    r_k                  -> PRIVATE   "rank" (1,), 0 before the client's first round: then it is that of `Ranks`
    AdamW's state        -> PRIVATE   "adam.*", see `training.common_lora`
    gamma, lambda        -> cfg.gamma, cfg.penalty
A round: a client gets the first r_k rows of A and columns of B (truncation), and takes I steps on
    F_k + lambda sum over modules of |B_tail|_F |A_tail|_F,   tail: ranks from floor(gamma r_k) on.
If that sum is strictly smaller in the end than it was in the beginning, r_k falls to max(r_min, floor(gamma r_k)). The
server pads with zeros and weighs by |B_k A_k|_F, see `aggregation.frobenius`; the head is averaged by examples. In the
end a client's model has its r_k ranks of what the server has; a client that no round met has all of them.
Ours: the server knows every client's rank; that it is kept in the client's PRIVATE row, from which the server's
truncation reads it, changes no number. |B_k A_k|_F is over all modules together (``weights=per_module``: Cho et al.).
The paper's r_k is nowhere said to have a floor; here r_min is one, as in the public implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.adapters.spectrum import singular_values
from fedtailor.aggregation.frobenius import FrobeniusMean
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Aggregator, Method, MethodEntry, Personalised, Report
from fedtailor.federated.ranks import Ranks
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.training.common_lora import CommonLoraConfig, CommonTraining
from fedtailor.training.local import cross_entropy_of, train

RANK = "rank"


class HetLoraConfig(CommonLoraConfig):
    """Defaults: PF2LoRA's Tables 6 and 7, but on CoLA lr 5e-3, penalty 1e-3 and r_min 5."""

    lr: Annotated[float, Field(gt=0)] = 2e-3
    rank: None = None  # type: ignore[assignment]
    """Has no meaning here: see ``ranks``."""
    ranks: Ranks = Ranks()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.99
    """Share of its ranks that a client keeps when it prunes; 1: none are pruned or penalised."""
    penalty: Annotated[float, Field(ge=0)] = 5e-3
    """lambda."""
    prune: bool = True
    """False: ranks stay what they were."""
    weights: Literal["frobenius", "per_module", "mean"] = "frobenius"
    """Of clients' A and B: |B_k A_k|_F over all modules together, of every module by itself, or as ``mean`` says."""
    mean: Literal["plain", "examples"] = "examples"
    """Of the head: every client counts once, or by its training examples."""


@dataclass(frozen=True)
class KeptRank:
    """PRIVATE "rank" (1,), one of a method's ``modules``."""

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """One number."""
        return [ParamSpec(RANK, (1,), Scope.PRIVATE)]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """0: the client has not taken part yet."""
        return {}


@dataclass(frozen=True)
class ClientRanks:
    """What the clients' ranks are, and what they leave of the server's adapter.

    Args:
        cfg: how they begin.
        adapter: the server's.
        budget: r of the training.
    """

    cfg: HetLoraConfig
    adapter: LoraAdapter
    budget: int

    def of(self, ctx: ClientContext) -> Tensor:
        """r_k of each lane, (K,) int64."""
        kept = [int(value) for value in ctx.params[RANK][:, 0]]
        first = (self.cfg.ranks.of(x.client.id, ctx.federation.seen, ctx.seed, self.budget) for x in ctx.lanes)
        return torch.tensor([old or new for old, new in zip(kept, first, strict=True)], device=ctx.net.device)

    def lowered(self, ranks: Tensor) -> Tensor:
        """floor(gamma r_k), (K,) int64."""
        return (self.cfg.gamma * ranks.double()).floor().long()

    @torch.no_grad()
    def truncate(self, ctx: ClientContext, ranks: Tensor) -> None:
        """Leaves the first r_k ranks of every lane, and zeros behind them."""
        there = (torch.arange(self.adapter.rank, device=ranks.device) < ranks.unsqueeze(1)).to(ctx.params[RANK])
        for x in self.adapter.layers_of(ctx.net):
            ctx.params[f"lora_A.{x.name}"].mul_(there.unsqueeze(2))
            ctx.params[f"lora_B.{x.name}"].mul_(there.unsqueeze(1))

    def tail(self, ctx: ClientContext, ranks: Tensor, lanes: int) -> Tensor:
        """Sum over modules of |B_tail|_F |A_tail|_F, (lanes,); ranks behind r_k are 0 and count nothing."""
        first = self.lowered(ranks[:lanes]).unsqueeze(1)
        behind = (torch.arange(self.adapter.rank, device=ranks.device) >= first).to(ctx.params[RANK])
        total = ctx.params[RANK].new_zeros(lanes)
        for x in self.adapter.layers_of(ctx.net):
            down, up = ctx.params[f"lora_A.{x.name}"][:lanes], ctx.params[f"lora_B.{x.name}"][:lanes]
            sizes = (part.flatten(1).norm(dim=1) for part in (down * behind.unsqueeze(2), up * behind.unsqueeze(1)))
            total = total + next(sizes) * next(sizes)
        return total

    def __call__(self, ctx: ClientContext) -> list[int]:
        """The downlink: what a client of r_k ranks is sent, and how many numbers that are."""
        ranks = self.of(ctx)
        self.truncate(ctx, ranks)
        width = sum(x.d_in + x.d_out for x in self.adapter.layers_of(ctx.net))
        whole = ctx.params.flat(Scope.SHARED).shape[1]
        return [whole - width * (self.adapter.rank - rank) for rank in ranks.tolist()]


@dataclass(frozen=True)
class PrunedSteps:
    """A round: I penalised steps, then pruning."""

    common: CommonTraining
    ranks: ClientRanks

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains and may lower r_k; ``rank`` is r_k after the round, ``tail`` the penalised sum."""
        cfg, ranks, cross_entropy = self.ranks.cfg, self.ranks.of(ctx), cross_entropy_of(ctx)

        def penalised(batch: LaneBatch) -> Tensor:
            loss = cross_entropy(batch)
            return loss + cfg.penalty * self.ranks.tail(ctx, ranks, batch.lanes).to(loss.dtype) if cfg.penalty else loss

        optimizer = self.common.begin(ctx)
        with torch.no_grad():
            before = self.ranks.tail(ctx, ranks, len(ctx.lanes))
        # A pruned rank has no gradient, but its moments would move it.
        trace = train(
            ctx, optimizer, cfg.training("train"), penalised, after_step=lambda _: self.ranks.truncate(ctx, ranks)
        )
        self.common.end(ctx, optimizer)
        with torch.no_grad():
            after = self.ranks.tail(ctx, ranks, len(ctx.lanes))
        if cfg.prune:
            lowered = self.ranks.lowered(ranks).clamp_min(cfg.ranks.least).minimum(ranks)
            ranks = torch.where(after < before, lowered, ranks)
            self.ranks.truncate(ctx, ranks)
        ctx.params.set(RANK, ranks.to(ctx.params[RANK]).unsqueeze(1))
        return Report({"train_loss": trace.loss, "tail": after, "rank": ranks.double()})


@dataclass(frozen=True)
class TruncatedModel:
    """The server's LoRA at the client's rank, as the downlink left it."""

    common: CommonTraining
    ranks: ClientRanks
    budgeted: bool

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Trains nothing but a new client's own head."""
        self.common.train_fresh_heads(ctx)
        lanes, ranks = ctx.lanes, self.ranks.of(ctx)
        if self.budgeted:
            lanes = tuple(replace(lane, budget=self.ranks.budget) for lane in lanes)

        def export(lane: int, base_ref: str) -> dict[str, bytes]:
            narrow = replace(self.common.adapter, rank=int(ranks[lane]))
            own = LaneParams(narrow.specs(ctx.net), 1, trained=False)
            for spec in own.specs:
                own.set(spec.name, ctx.params[spec.name][lane].detach().cpu()[tuple(map(slice, spec.shape))])
            return narrow.export(ctx.net, own, [lanes[lane].client.id], 0, base_ref)

        spectra = singular_values([self.common.adapter], ctx.net, ctx.params)
        return Personalised(lanes, ctx.net.logits, metrics={"rank": ranks.double()}, spectra=spectra, export=export)


def build(cfg: HetLoraConfig, r_max: int) -> Method:
    """HETLoRA on the largest of the clients' ranks; with ranks=budget a training for each budget."""
    wide = cfg.model_copy(update={"rank": cfg.ranks.largest(r_max)})
    common = CommonTraining(wide, wide.adapter())
    ranks = ClientRanks(wide, common.adapter, r_max)
    own: Aggregator = cfg.aggregator() if cfg.weights == "mean" else FrobeniusMean(cfg.weights == "per_module")
    return common.method(
        "hetlora",
        PrunedSteps(common, ranks),
        TruncatedModel(common, ranks, cfg.ranks.name == "budget"),
        modules=(KeptRank(), *common.modules),
        aggregator=own,
        downlink=ranks,
        ranks=cfg.ranks,
        per_budget=cfg.ranks.name == "budget",
    )


ENTRY = MethodEntry(
    name="hetlora",
    config=HetLoraConfig,
    build=build,
    title="HETLoRA",
    summary="a LoRA whose clients have ranks of their own and prune them (Cho et al. 2024)",
    colour="#ee7733",
    marker="^",
    tiny={
        "lr": 5e-3,
        "batch_size": 4,
        "local_steps": 3,
        "ranks": {"name": "formula", "r_min": 1, "r_max": 3},
        "gamma": 0.5,
        "penalty": 0.1,
    },
)
