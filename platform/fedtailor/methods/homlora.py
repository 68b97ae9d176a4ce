"""HOMLoRA: one LoRA of one rank for all clients, trained by local steps and averaged.

Paper: as a baseline in Hao, Wu, Payani, Lee, Liu, "Personalized Federated Fine-tuning for Heterogeneous Data: An
Automatic Rank Learning Approach via Two-Level LoRA" (arXiv 2503.03920), section 3.
    A, B (and the head)  -> SHARED    "lora_*", the head's own weights
    AdamW's state        -> PRIVATE   "adam.*", see `training.common_lora`; with head=client the head, too
    I, r                 -> cfg.local_steps, cfg.rank
A round: every client takes I steps of AdamW on its own batches; the server takes the plain mean. The client's model is
the common one.
Ours: what the paper leaves open (head, weight decay, moments over rounds) is a switch, see `CommonLoraConfig`; with a
head of its own, a client that no round met trains it by I steps in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from fedtailor.adapters.spectrum import singular_values
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised, Report
from fedtailor.training.common_lora import CommonLoraConfig, CommonTraining
from fedtailor.training.local import train


class HomLoraConfig(CommonLoraConfig):
    """Defaults of `CommonLoraConfig`; Table 6 has lr 1e-3, on SST-2 2e-3."""


@dataclass(frozen=True)
class LocalSteps:
    """A round: I steps."""

    common: CommonTraining

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received parameters on the client's data."""
        optimizer = self.common.begin(ctx)
        trace = train(ctx, optimizer, self.common.cfg.training("train"))
        self.common.end(ctx, optimizer)
        return Report({"train_loss": trace.loss})


@dataclass(frozen=True)
class CommonModel:
    """The common LoRA as the rounds left it."""

    common: CommonTraining
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Trains nothing but a new client's own head."""
        self.common.train_fresh_heads(ctx)
        adapter, clients = self.common.adapter, [lane.client.id for lane in ctx.lanes]
        return Personalised(
            ctx.lanes,
            ctx.net.logits,
            spectra=singular_values([adapter], ctx.net, ctx.params),
            export=partial(adapter.export, ctx.net, ctx.params, clients),
        )


def build(cfg: HomLoraConfig, r_max: int) -> Method:
    """HOMLoRA of rank ``cfg.rank``, whatever the budget."""
    common = CommonTraining(cfg, cfg.adapter())
    return common.method("homlora", LocalSteps(common), CommonModel(common))


ENTRY = MethodEntry(
    name="homlora",
    config=HomLoraConfig,
    build=build,
    title="HOMLoRA",
    summary="one LoRA by local AdamW steps and a plain mean (baseline of Hao et al. 2025)",
    colour="#0077bb",
    marker="o",
    tiny={"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3, "dropout": 0.2},
)
