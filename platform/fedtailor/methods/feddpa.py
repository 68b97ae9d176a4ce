"""FedDPA: a global LoRA that is averaged and a local LoRA that stays with its client.

Paper: Yang et al., "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024, in the form that
FedP2EFT (section 4.1.2, A.3, "Personalized FL") uses as a base model for classification (``form=sum``).
    A, B (global), classifier -> SHARED    "global_*", the head's own weights
    A, B (local)              -> PRIVATE   "local_*"
    r, alpha, dropout         -> cfg.rank (both adapters), cfg.scale = alpha / r = 1, cfg.dropout
A round at a client: (1) the global LoRA and the head train from the server's state; (2) they are frozen as trained,
and the local LoRA trains on top of them. Only the global part is sent. Later stages see the aggregated global part
merged into the common weights plus each client's local LoRA, a fixed sum (`LocalLoraOverlay`). A client that was never
sampled has the initial local LoRA, which changes nothing.
The original (LLaMA, instruction data) weighs the two by the similarity of inputs, see `methods.feddpa_instance`. Its
form T trains the local part first in every round, its form F once, after the rounds and from the global part, so that
nothing is PRIVATE there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from fedtailor.adapters.lora import AdapterPair, LoraAdapter, chosen_layers
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.methods.feddpa_config import FedDpaConfig
from fedtailor.methods.feddpa_instance import DualModel, DualTraining
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import NoPersonalisation
from fedtailor.training.local import Training, train


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
    """FedDPA in the form ``cfg.form``."""
    scope = Scope.EPHEMERAL if cfg.form == "f" else Scope.PRIVATE
    shared = LoraAdapter(cfg.rank, cfg.scale, Scope.SHARED, targets=cfg.targets, head=True, prefix="global")
    own = LoraAdapter(cfg.local_rank, cfg.scale, scope, targets=cfg.targets, prefix="local")
    pair = AdapterPair(shared, own)
    phases = 2 if cfg.local_rank and cfg.form != "f" else 1
    method = Method(
        name="feddpa",
        adapter=pair if cfg.local_rank else shared,
        local_update=GlobalThenLocal(cfg, pair if cfg.local_rank else shared),
        personaliser=NoPersonalisation(),
        aggregator=WeightedMean(),
        server=ServerSgd(cfg.server_lr),
        batch_size=cfg.batch_size,
        epochs=phases * cfg.epochs,
        steps=phases * cfg.local_steps if cfg.local_steps else None,
        overlay=LocalLoraOverlay(own) if cfg.local_rank else None,
    )
    if cfg.form == "sum":
        return method
    dual = DualTraining(cfg, pair)
    return replace(
        method, local_update=dual, personaliser=DualModel(dual), overlay=None, adapter_is_model=False,
        search_epochs=cfg.epochs if cfg.form == "f" else 0,
    )  # fmt: skip


def note(cfg: FedDpaConfig) -> str:
    """Which of the paper's forms it is; nothing of FedP2EFT's."""
    if cfg.form == "sum":
        return ""
    return f"FedDPA is in form {cfg.form.upper()}, local weight at most {cfg.max_weight:g} by {cfg.instances} prompts."


ENTRY = MethodEntry(
    name="feddpa",
    config=FedDpaConfig,
    build=build,
    title="FedDPA",
    summary="a global LoRA and a local one per client (Yang et al. 2024; as a base FedDPA-T)",
    base=True,
    note=note,
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "local_rank": 2, "dropout": 0.2},
)
