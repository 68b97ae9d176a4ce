"""Ditto on LoRA: a common model by FedAvg, and a personal one per client that is pulled towards it.

Paper: Li, Hu, Beirami, Smith, "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021
(arXiv 2012.04221), Algorithm 1.
    w       -> SHARED    "global_*"     A and B of every adapted layer
    v_k     -> PRIVATE   "personal_*"   likewise
    w^t     -> ctx.received
    lambda  -> cfg.lam
    eta, s  -> cfg.lr, cfg.epochs (an epoch is ceil(n_k / batch_size) of the paper's s steps)
A round at a client: w trains on F_k from w^t and is sent; v_k trains on h_k(v; w^t) = F_k(v) + lambda/2 |v - w^t|^2 and
stays. Both see the same batches in the same order, as in the public code. The personal model is v_k alone.
One training per budget r: w and v_k are LoRA of rank r.
Ours: Adam in the place of SGD; a client's first v_k starts from the w^t that it receives (in round 0 this is Algorithm
1's common start); in the end every client solves h_k(v; w^T) once more, from its v_k, or from w^T where it was never
sampled: so clients that no round knew have a personal model, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.lora import AdapterPair, LoraAdapter
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import FinetuneConfig, budget_lanes
from fedtailor.training.local import train
from fedtailor.training.proximal import ProximalTerm


class DittoConfig(FinetuneConfig):
    """Rate, epochs and batch size, for w and v_k alike, are those of LoRA in FedP2EFT (A.4)."""

    lam: Annotated[float, Field(ge=0)] = 1.0
    """lambda. The paper's value for devices with hardly any validation data; others pick one of 0.1, 1, 2 by theirs.
    Under strong attacks it is 0.1, or one of 0.05, 0.1, 0.2."""


@dataclass(frozen=True)
class GlobalAndPersonal:
    """A round: w on F_k, v_k on h_k."""

    cfg: DittoConfig
    pair: AdapterPair

    def __call__(self, ctx: ClientContext) -> Report:
        """One client's part of a round; ``personal_drift`` is |v_k - w^t|."""
        self.pair.switch(ctx.net, ctx.params, "first")
        groups = [AdamGroup(self.pair.first.names(ctx.net), self.cfg.lr)]
        shared = train(ctx, groups, self.cfg.training("train")).loss
        personal, drift = solve(ctx, self.pair, self.cfg, "train")
        return Report({"train_loss": shared, "personal_train_loss": personal, "personal_drift": drift})


@dataclass(frozen=True)
class PersonalModel:
    """v_k, solved once more with the final w."""

    cfg: DittoConfig
    pair: AdapterPair
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Leaves v_k bound; the budget is one, the rank of w and v_k."""
        lanes = budget_lanes(ctx).lanes
        loss, drift = solve(ctx, self.pair, self.cfg, "personalise")
        metrics = {"train_loss": loss, "personal_drift": drift}
        export = partial(self.pair.second.export, ctx.net, ctx.params, [lane.client.id for lane in lanes])
        return Personalised(lanes, ctx.net.logits, metrics=metrics, export=export)


def solve(ctx: ClientContext, pair: AdapterPair, cfg: DittoConfig, purpose: str) -> tuple[Tensor, Tensor]:
    """Trains v_k on h_k(v; w^t), from w^t where the client has no v_k yet; mean F_k and |v_k - w^t|, (K,) each."""
    names = zip(pair.second.names(ctx.net), pair.first.names(ctx.net), strict=True)
    received = {own: ctx.received[common] for own, common in names}
    with torch.no_grad():
        for own, value in received.items():
            ctx.params[own][ctx.fresh] = value[ctx.fresh]
    pair.switch(ctx.net, ctx.params, "second")
    pull = ProximalTerm(ctx.params, received, cfg.lam)
    trace = train(ctx, [AdamGroup(tuple(received), cfg.lr)], cfg.training(purpose), after_backward=pull)
    return trace.loss, pull.distance()


def build(cfg: DittoConfig, r_max: int) -> Method:
    """Ditto for LoRA of rank ``r_max``."""
    shared = LoraAdapter(r_max, cfg.scale, Scope.SHARED, prefix="global")
    pair = AdapterPair(shared, LoraAdapter(r_max, cfg.scale, Scope.PRIVATE, prefix="personal"))
    return Method(
        name="ditto",
        adapter=pair,
        local_update=GlobalAndPersonal(cfg, pair),
        personaliser=PersonalModel(cfg, pair),
        aggregator=WeightedMean(),
        server=ServerSgd(),
        batch_size=cfg.batch_size,
        epochs=2 * cfg.epochs,
        steps=2 * cfg.local_steps if cfg.local_steps else None,
        budget_epochs=cfg.epochs,
        per_budget=True,
    )


ENTRY = MethodEntry(
    name="ditto",
    config=DittoConfig,
    build=build,
    title="Ditto",
    summary="common LoRA by FedAvg, a personal one per client pulled towards it (Li et al. 2021)",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "lam": 0.5, "dropout": 0.2},
)
