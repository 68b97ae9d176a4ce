"""One LoRA by local epochs, and the model of a client that uses it as the rounds left it: pFedGPT's baselines.

Paper: Shen, Xu, Wang, Li, Pan, "pFedGPT: Hierarchically Optimizing LoRA Aggregation Weights for Personalized Federated
GPT Models", EMNLP 2025, sections 5 and E.3. All rows of its tables train the same LoRA the same way, and differ in what
is aggregated and how. Where its text and the code beside it disagree, the constants here are the code's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from pydantic import Field

from fedtailor.adapters.lora import LoraAdapter, Targets
from fedtailor.core.scope import Scope
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Personalised, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.training.finetune import FinetuneConfig
from fedtailor.training.local import train


class EpochLoraConfig(FinetuneConfig):
    """Defaults: pFedGPT's tables on Dolly; alpha = 16 at rank 8."""

    lr: Rate = 1.5e-4
    """FedIT's. On Flan 3e-4, FedDPA's."""
    epochs: Positive = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    rank: Positive = 8
    targets: Targets = ("query", "value")
    """Layers that get a LoRA: all, ``body``, ``head``, or endings of module paths; these are LLaMA's q_proj and v_proj,
    too."""

    def adapter(self, rank: int | None = None) -> LoraAdapter:
        """A and B, SHARED, of rank ``rank``, by default the configured one."""
        return LoraAdapter(rank or self.rank, self.scale, Scope.SHARED, targets=self.targets)


@dataclass(frozen=True)
class LocalEpochs:
    """A round: E epochs on what was received."""

    cfg: EpochLoraConfig
    adapter: LoraAdapter

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received parameters on the client's data."""
        trace = train(ctx, [AdamGroup(self.adapter.names(ctx.net), self.cfg.lr)], self.cfg.training("train"))
        return Report({"train_loss": trace.loss})


@dataclass(frozen=True)
class ReceivedModel:
    """A client's model is what it was sent; one for all budgets."""

    adapter: LoraAdapter
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Changes nothing."""
        clients = [lane.client.id for lane in ctx.lanes]
        export = partial(self.adapter.export, ctx.net, ctx.params, clients)
        return Personalised(ctx.lanes, ctx.net.logits, export=export)
