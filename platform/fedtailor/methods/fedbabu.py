"""FedBABU on LoRA: the body is trained together below a head that nobody trains; clients tune the head in the end.

Paper: Oh, Kim, Yun, "FedBABU: Toward Enhanced Representation for Federated Image Classification", ICLR 2022
(arXiv 2106.06042), Algorithm 1.
    theta_ext (body)  -> SHARED      A and B of every adapted layer but the head's
    theta_cls (head)  -> FROZEN      in the rounds, as the stage found it; EPHEMERAL A and B when a client tunes it
    tau, tau_f        -> cfg.epochs, cfg.tune_epochs
A round is FedAvg on the body. In the end each client tunes the head, from the common body and the common head.
One training per budget r: LoRA of rank r in body and head.
Ours: Adam in the place of SGD; the head that stays frozen is that of the base model (random with base=none, as in the
paper), and what is tuned is a LoRA on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.scope import Scope
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import FinetuneConfig, budget_lanes, repeat_lanes
from fedtailor.training.local import train


class FedBabuConfig(FinetuneConfig):
    """Rate, local epochs and batch size are those of LoRA in FedP2EFT (A.4); the paper's are for SGD on all weights."""

    tune: Literal["head", "body", "all-linear"] | None = None
    """What clients tune in the end; the paper compares all three. None: the head, as in its Algorithm 1, and all layers
    where the head carries no adapter, which is so for language models."""
    tune_epochs: Positive = 5
    """tau_f: as in Flower's reproduction of the paper's Table 13."""


@dataclass(frozen=True)
class BodyTraining:
    """A round: E epochs on the body alone."""

    cfg: FedBabuConfig
    body: LoraAdapter

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received body on the client's data."""
        groups = [AdamGroup(self.body.names(ctx.net), self.cfg.lr)]
        return Report({"train_loss": train(ctx, groups, self.cfg.training("train")).loss})


@dataclass(frozen=True)
class Tuned:
    """The common body, and a head (or more) of the client's own."""

    cfg: FedBabuConfig
    body: LoraAdapter
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Tunes a copy of the common model at the one budget, the rank of its training."""
        net, whole = ctx.net, replace(self.body, scope=Scope.EPHEMERAL, targets="all-linear")
        own = ctx.fork(budget_lanes(ctx).lanes, whole)
        for name in self.body.names(net):
            own.params.set(name, repeat_lanes(ctx.params[name].detach(), ctx))
        tuned = replace(whole, targets=self.cfg.tune or ("head" if net.heads else "all-linear"))
        how = replace(self.cfg.training("personalise"), epochs=self.cfg.tune_epochs, steps=None)
        trace = train(own, [AdamGroup(tuned.names(net), self.cfg.lr)], how)
        clients = [lane.client.id for lane in own.lanes]
        return Personalised(
            lanes=own.lanes,
            logits=net.logits,
            metrics={"train_loss": trace.loss},
            export=partial(whole.export, net, own.params, clients),
        )


def build(cfg: FedBabuConfig, r_max: int) -> Method:
    """FedBABU for LoRA of rank ``r_max``."""
    body = LoraAdapter(r_max, cfg.scale, Scope.SHARED, targets="body")
    return Method(
        name="fedbabu",
        adapter=body,
        local_update=BodyTraining(cfg, body),
        personaliser=Tuned(cfg, body),
        aggregator=WeightedMean(),
        server=ServerSgd(),
        requires=frozenset({Capability.CLASSES} if cfg.tune == "head" else ()),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        steps=cfg.local_steps,
        budget_epochs=cfg.tune_epochs,
        per_budget=True,
    )


ENTRY = MethodEntry(
    name="fedbabu",
    config=FedBabuConfig,
    build=build,
    title="FedBABU",
    summary="FedAvg on the body, the head frozen; clients tune the head (Oh et al. 2022)",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "tune_epochs": 1, "dropout": 0.2},
)
