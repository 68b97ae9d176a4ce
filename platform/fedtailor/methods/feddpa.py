"""FedDPA-T: a global LoRA that is averaged and a local LoRA that stays with its client.

Paper: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, in the form that
FedP2EFT (section 4.1.2, A.3, "Personalized FL") uses as a base model for classification.
    A, B (global), classifier -> SHARED    "global_*", the head's own weights
    A, B (local)              -> PRIVATE   "local_*"
    r, alpha, dropout         -> cfg.rank (both adapters), cfg.scale = alpha / r = 1, cfg.dropout
A round at a client: (1) the global LoRA and the head train from the server's state; (2) they are frozen as trained,
and the local LoRA trains on top of them. Only the global part is sent. Later stages see the aggregated global part
merged into the common weights plus each client's local LoRA, a fixed sum (`LocalLoraOverlay`). A client that was never
sampled has the initial local LoRA, which changes nothing.
The original (LLaMA, instruction data) trains the local part first and weighs the two by the similarity of inputs;
that form belongs to generation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor, nn

from fedtailor.adapters.lora import AdapterPair, LoraAdapter, chosen_layers
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import Natural, Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import NoPersonalisation
from fedtailor.training.local import Training, train


class FedDpaConfig(Config):
    """Defaults: FedP2EFT A.3."""

    when_absent: ClassVar[Mapping[str, Any]] = {"local_steps": None}
    targets: tuple[str, ...] = ("query", "value")
    rank: Positive = 8
    local_rank: Natural = 8
    """0: no local LoRA, i.e. FedAvg on LoRA."""
    scale: Rate = 1.0
    """alpha / r = 8 / 8."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lr: Rate = 5e-5
    epochs: Positive = 2
    """Of each of the two phases."""
    local_steps: Positive | None = None
    """Exactly so many steps in the place of epochs, in each of the two phases."""
    batch_size: Positive = 32
    server_lr: Rate = 1.0


@dataclass(frozen=True)
class GlobalThenLocal:
    """The two phases of a round; the first alone where there is no local LoRA."""

    cfg: FedDpaConfig
    adapter: LoraAdapter | AdapterPair

    def __call__(self, ctx: ClientContext) -> Report:
        """One client's part of a round."""
        if isinstance(self.adapter, LoraAdapter):
            return Report({"train_loss": self._train(ctx, self.adapter, "train")})
        self.adapter.switch(ctx.net, ctx.params, "first")
        loss = self._train(ctx, self.adapter.first, "train")
        self.adapter.switch(ctx.net, ctx.params, "both")
        return Report({"train_loss": loss, "local_train_loss": self._train(ctx, self.adapter.second, "local")})

    def _train(self, ctx: ClientContext, part: LoraAdapter, purpose: str) -> Tensor:
        cfg = self.cfg
        how = Training(cfg.epochs, cfg.batch_size, purpose, dropout=cfg.dropout, steps=cfg.local_steps)
        return train(ctx, [AdamGroup(part.names(ctx.net), self.cfg.lr)], how).loss


@dataclass(frozen=True)
class LocalLoraOverlay:
    """The clients' local LoRA as part of their base.

    Args:
        local: the local part of the base stage's adapter.
    """

    local: LoraAdapter

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """The PRIVATE parameters of the base stage, in its order."""
        return self.local.specs(net)

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Seeded A, B zero."""
        return self.local.initial(net, seed)

    def bind(self, net: LaneNet, params: LaneParams) -> None:
        """Adds a frozen branch to the adapted layers."""
        for adapted, layer in chosen_layers(net, self.local.targets):
            layer.overlay = self.local.branch(adapted, params)

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """Adds a client's local LoRA to the common weights."""
        self.local.merge(model, tensors)


def build(cfg: FedDpaConfig, r_max: int) -> Method:
    """FedDPA-T."""
    shared = LoraAdapter(cfg.rank, cfg.scale, Scope.SHARED, targets=cfg.targets, head=True, prefix="global")
    own = LoraAdapter(cfg.local_rank, cfg.scale, Scope.PRIVATE, targets=cfg.targets, prefix="local")
    adapter = AdapterPair(shared, own) if cfg.local_rank else shared
    phases = 2 if cfg.local_rank else 1
    return Method(
        name="feddpa",
        adapter=adapter,
        local_update=GlobalThenLocal(cfg, adapter),
        personaliser=NoPersonalisation(),
        aggregator=WeightedMean(),
        server=ServerSgd(cfg.server_lr),
        batch_size=cfg.batch_size,
        epochs=phases * cfg.epochs,
        steps=phases * cfg.local_steps if cfg.local_steps else None,
        overlay=LocalLoraOverlay(own) if cfg.local_rank else None,
    )


ENTRY = MethodEntry(
    name="feddpa",
    config=FedDpaConfig,
    build=build,
    title="FedDPA-T",
    summary="FedDPA-T: global LoRA and a local one per client (Yang et al. 2024)",
    base=True,
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "local_rank": 2, "dropout": 0.2},
)
