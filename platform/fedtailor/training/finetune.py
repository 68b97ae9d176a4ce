"""Personal fine-tuning of the kept ranks of every client at every budget, one lane each; or the model as it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.lora import lora_names
from fedtailor.adapters.peft_export import export_adapter
from fedtailor.adapters.selected_lora import RankSelection, SelectedLora
from fedtailor.core.config import Config
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Personalised
from fedtailor.lanes.adam import AdamGroup
from fedtailor.training.local import Training, train


class FinetuneConfig(Config):
    """Personal fine-tuning with cross-entropy alone (FedP2EFT section 3.2 and A.4)."""

    when_absent: ClassVar[Mapping[str, Any]] = {"local_steps": None}
    lr: Rate = 1e-4
    epochs: Positive = 2
    local_steps: Positive | None = None
    """Exactly so many steps in the place of epochs (PF2LoRA's I, of every method alike)."""
    batch_size: Positive = 32
    scale: Rate = 2.0
    """s = alpha / r; the paper's alpha = 2 r gives 2 at every budget."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None

    def training(self, purpose: str) -> Training:
        """How `train` runs by these settings; see `Training.purpose`."""
        return Training(
            self.epochs, self.batch_size, purpose, self.max_grad_norm, dropout=self.dropout, steps=self.local_steps
        )


def budget_lanes(ctx: ClientContext) -> ClientContext:
    """A context whose lanes are (client, budget), client-major; parameters are still the clients'."""
    return ctx.with_lanes([replace(lane, budget=budget) for lane in ctx.lanes for budget in ctx.budgets])


def finetune(
    ctx: ClientContext,
    selection: RankSelection,
    cfg: FinetuneConfig,
    *,
    selects_ranks: bool,
    strategy: Tensor | None = None,
    metrics: Mapping[str, Tensor] | None = None,
    rates: Tensor | None = None,
) -> Personalised:
    """Trains A and B of the kept ranks, lambda frozen.

    Args:
        ctx: (client, budget) lanes as `budget_lanes` makes them.
        selection: one row per lane.
        cfg: rates and epochs.
        selects_ranks: whether the ranks were chosen per client.
        strategy: lambda before pruning, (clients, L, r_init).
        metrics: further values (K,).
        rates: learning rates (K, 2L), A then B of each layer, in the place of ``cfg.lr``.
    """
    adapter = SelectedLora(selection, cfg.scale)
    own = ctx.fork(ctx.lanes, adapter)
    groups = [AdamGroup(lora_names(ctx.net), cfg.lr if rates is None else rates)]
    trace = train(own, groups, cfg.training("personalise"))

    def export(lane: int, base_ref: str) -> dict[str, bytes]:
        a, b, lam = {}, {}, {}
        for number, (adapted, width) in enumerate(zip(ctx.net.adapted, adapter.width, strict=True)):
            a[adapted.name] = own.params[f"lora_A.{adapted.name}"][lane].detach().cpu()
            b[adapted.name] = own.params[f"lora_B.{adapted.name}"][lane].detach().cpu()
            lam[adapted.name] = adapter.lambdas(number, width)[lane].cpu()
        return export_adapter(ctx.net.adapted, a, b, lam, cfg.scale, base_ref, ctx.lanes[lane].client.id)

    clients = [lane.client.id for lane in ctx.lanes[:: len(ctx.budgets)]]
    return Personalised(
        lanes=own.lanes,
        logits=ctx.net.logits,
        ranks=selection.ranks,
        selects_ranks=selects_ranks,
        metrics={"train_loss": trace.loss, **(metrics or {})},
        strategy=dict(zip(clients, strategy, strict=True)) if strategy is not None else {},
        export=export,
    )


def budgets_of(ctx: ClientContext) -> list[int]:
    """Budget of each lane."""
    return [int(lane.budget or 0) for lane in ctx.lanes]


def repeat_lanes(values: Tensor, ctx: ClientContext) -> Tensor:
    """Client rows (clients, ...) repeated for each budget, in lane order."""
    return torch.repeat_interleave(values, len(ctx.budgets), dim=0)


@dataclass(frozen=True)
class NoPersonalisation:
    """Whatever is bound to the model answers."""

    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Changes nothing."""
        return Personalised(ctx.lanes, ctx.net.logits)
