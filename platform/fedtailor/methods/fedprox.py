"""FedProx on LoRA: FedAvg whose clients are held near what they received.

Paper: Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith, "Federated Optimization in Heterogeneous Networks", MLSys 2020
(arXiv 1812.06127), Algorithm 2.
    w     -> SHARED   A and B of every adapted layer
    w^t   -> ctx.received
    mu, E -> cfg.mu, cfg.epochs
Every client minimises h_k(w; w^t) = F_k(w) + mu/2 |w - w^t|^2 by E epochs of Adam; mu = 0 is FedAvg.
Ours: clients are sampled uniformly and weighted by examples, as in `fedavg`, and each does all of its work, while
the paper also has devices that stop early. The client uses the common model as it is: one for all budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from fedtailor.adapters.lora import LoraAdapter, Targets
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.scope import Scope
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import FinetuneConfig, NoPersonalisation
from fedtailor.training.local import train
from fedtailor.training.proximal import ProximalTerm


class FedProxConfig(FinetuneConfig):
    """Rate, epochs and batch size are those of LoRA in FedP2EFT (A.4); the paper's are for SGD on all weights."""

    mu: Annotated[float, Field(ge=0)] = 0.01
    """The best of the paper's candidates 0.001, 0.01, 0.1, 1 on Sent140, its classification of texts (section 5)."""
    rank: Positive = 8
    targets: Targets = "all-linear"
    """Layers that get a LoRA: all, ``body``, ``head``, or e.g. ``[query, value]``."""


@dataclass(frozen=True)
class NearReceived:
    """E epochs on h_k."""

    cfg: FedProxConfig
    adapter: LoraAdapter

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received parameters; ``drift`` is |w - w^t| in the end."""
        names = self.adapter.names(ctx.net)
        pull = ProximalTerm(ctx.params, {name: ctx.received[name] for name in names}, self.cfg.mu)
        trace = train(ctx, [AdamGroup(names, self.cfg.lr)], self.cfg.training("train"), after_backward=pull)
        return Report({"train_loss": trace.loss, "drift": pull.distance()})


def build(cfg: FedProxConfig, r_max: int) -> Method:
    """FedProx with the mean weighted by examples."""
    adapter = LoraAdapter(cfg.rank, cfg.scale, Scope.SHARED, targets=cfg.targets)
    return Method(
        name="fedprox",
        adapter=adapter,
        local_update=NearReceived(cfg, adapter),
        personaliser=NoPersonalisation(),
        aggregator=WeightedMean(),
        server=ServerSgd(),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        steps=cfg.local_steps,
    )


ENTRY = MethodEntry(
    name="fedprox",
    config=FedProxConfig,
    build=build,
    title="FedProx",
    summary="FedAvg on LoRA, held near what was received (Li et al. 2020)",
    base=True,
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "mu": 0.5, "dropout": 0.2},
)
