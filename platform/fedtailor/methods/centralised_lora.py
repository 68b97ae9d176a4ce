"""Centralised LoRA: HOMLoRA's steps on the rows of all clients in one place, as if there were one client.

Paper: as a baseline in Hao, Wu, Payani, Lee, Liu (PF2LoRA, arXiv 2503.03920), section 6.
    A, B (and the head)  -> SHARED    "lora_*", the head's own weights
    AdamW's state        -> PRIVATE   "adam.*", of the one client; see `training.common_lora`
A round is I steps of batch B (``examples=client``), or I steps for each client of a federated round
(``examples=equal``, the default: as many examples as HOMLoRA sees; the paper does not say). One client sends one row,
so the average is that row, and nothing depends on how many processes there are. In the end every client is tested by
itself on the common model, as with HOMLoRA: its test rows are those of the federated methods.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report
from fedtailor.methods import homlora
from fedtailor.training.common_lora import CommonLoraConfig, CommonTraining
from fedtailor.training.local import train


class CentralisedLoraConfig(CommonLoraConfig):
    """Defaults of `CommonLoraConfig`; Table 6 has lr 1e-3 for CoLA and nothing for the others."""

    head: Literal["shared", "frozen"] = "shared"
    """The head's own weights: trained like A and B, or left as they are."""
    examples: Literal["equal", "client"] = "equal"
    """Steps a round: as many as the clients of a federated round take together, or as one of them takes."""


@dataclass(frozen=True)
class PooledSteps:
    """A round on the pooled rows."""

    cfg: CentralisedLoraConfig
    common: CommonTraining

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the common LoRA."""
        how, optimizer = self.cfg.training("train"), self.common.begin(ctx)
        times = ctx.federation.cohort if self.cfg.examples == "equal" else 1
        trace = train(ctx, optimizer, replace(how, steps=self.cfg.local_steps * times))
        self.common.end(ctx, optimizer)
        return Report({"train_loss": trace.loss})


def build(cfg: CentralisedLoraConfig, r_max: int) -> Method:
    """HOMLoRA with one client, which has all rows."""
    common = CommonTraining(cfg, cfg.adapter())
    pooled = "examples" if cfg.examples == "equal" else "steps"
    return common.method("centralised_lora", PooledSteps(cfg, common), homlora.CommonModel(common), pooled=pooled)


def note(cfg: CentralisedLoraConfig) -> str:
    """How many examples it sees."""
    much = "as many examples as a federated round" if cfg.examples == "equal" else f"{cfg.local_steps} steps"
    return f"Centralised LoRA has all clients' rows in one place and takes {much} in place of a round."


ENTRY = MethodEntry(
    name="centralised_lora",
    config=CentralisedLoraConfig,
    build=build,
    title="Centralised LoRA",
    summary="one LoRA on all clients' rows in one place (baseline of Hao et al. 2025)",
    colour="#33bbee",
    marker="s",
    tiny={"lr": 5e-3, "batch_size": 4, "local_steps": 2, "rank": 3},
    note=note,
)
