"""LoRA per client: the same rank r in every layer, trained on the client's data alone.

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; as the baseline "LoRA PEFT" of
FedP2EFT (section 4.1.3, A.4): all linear layers, alpha = 2 r, rate 1e-4, two epochs.
    A, B -> EPHEMERAL
"""

from __future__ import annotations

from dataclasses import dataclass

from fedtailor.adapters.selected_lora import uniform_selection
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import FinetuneConfig, budget_lanes, budgets_of, finetune


class LoraConfig(FinetuneConfig):
    """Defaults of `FinetuneConfig` are the paper's."""


@dataclass(frozen=True)
class UniformLora:
    """Rank r in every layer."""

    cfg: LoraConfig
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """One LoRA per client and budget."""
        lanes = budget_lanes(ctx)
        selection = uniform_selection(budgets_of(lanes), len(ctx.net.adapted), 2 * ctx.r_max, ctx.sizes)
        return finetune(lanes, selection, self.cfg, selects_ranks=False)


def build(cfg: LoraConfig, r_max: int) -> Method:
    """A client-only method: no rounds."""
    return Method(
        "lora", UniformLora(cfg), WeightedMean(), ServerSgd(), batch_size=cfg.batch_size, budget_epochs=cfg.epochs
    )


ENTRY = MethodEntry(
    name="lora",
    config=LoraConfig,
    build=build,
    title="LoRA",
    summary="LoRA per client, rank r everywhere (Hu et al. 2022)",
    colour="#0072b2",
    marker="o",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "dropout": 0.25, "max_grad_norm": 0.1},
)
