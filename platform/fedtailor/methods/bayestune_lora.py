"""BayesTune-LoRA: every client searches its own ranks, alone.

Paper: FedP2EFT (Lee et al., arXiv 2502.04387, section 3.2), after BayesTune (Kim & Hospedales, NeurIPS 2023).
    lambda, A, B -> EPHEMERAL
    r_init       -> cfg.r_mul * largest budget (alpha_r_mul = 2, so 32 at budgets up to 16)
    alpha_s, alpha_p, s -> cfg.search.alpha_s, cfg.search.alpha_p, cfg.finetune.scale
One search serves all budgets; the r L largest lambdas are kept, frozen, and A and B are trained anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from fedtailor.adapters.bayestune_lora import BayesTuneLora
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.bayestune import RankSearchConfig, search_ranks
from fedtailor.training.finetune import FinetuneConfig, budget_lanes, budgets_of, finetune, repeat_lanes
from fedtailor.training.pruning import RANK_BITS, TieRule, prune, tied_share


class BayesTuneLoraConfig(Config):
    """Defaults: FedP2EFT A.4."""

    search: RankSearchConfig = RankSearchConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    r_mul: Positive = 2
    lambda_init: Annotated[float, Field(gt=0)] = 1e-4
    ties: TieRule = "rank_then_layer"
    rank_bits: Annotated[int, Field(ge=1, le=53)] = RANK_BITS
    """Mantissa bits of lambda that the ranking looks at; 24, all that a float32 has, compares exactly."""


@dataclass(frozen=True)
class OwnRanks:
    """Search, prune, fine-tune."""

    cfg: BayesTuneLoraConfig
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Personalises every client with the ranks that it found."""
        cfg, r_init = self.cfg, self.cfg.r_mul * ctx.r_max
        searching = ctx.fork(ctx.lanes, BayesTuneLora(r_init, cfg.finetune.scale))
        start = torch.full((len(ctx.lanes), len(ctx.net.adapted), r_init), cfg.lambda_init).to(ctx.sizes)
        lam, _ = search_ranks(searching, start, cfg.search)
        lanes = budget_lanes(ctx)
        wide = repeat_lanes(lam, ctx)
        selection = prune(wide, budgets_of(lanes), cfg.ties, cfg.rank_bits)
        tied = {"tied_at_threshold": tied_share(wide, selection, cfg.rank_bits)}
        return finetune(lanes, selection, cfg.finetune, selects_ranks=True, strategy=lam, metrics=tied)


def build(cfg: BayesTuneLoraConfig, r_max: int) -> Method:
    """A client-only method: no rounds."""
    return Method(
        "bayestune_lora",
        OwnRanks(cfg),
        WeightedMean(),
        ServerSgd(),
        batch_size=max(cfg.search.batch_size, cfg.finetune.batch_size),
        search_epochs=cfg.search.epochs,
        budget_epochs=cfg.finetune.epochs,
    )


ENTRY = MethodEntry(
    name="bayestune_lora",
    config=BayesTuneLoraConfig,
    build=build,
    title="BayesTune-LoRA",
    summary="per-client Bayesian rank search (FedP2EFT 3.2)",
    colour="#e69f00",
    marker="^",
    tiny={
        "search": {"lr": 5e-3, "batch_size": 4, "epochs": 2, "lambda_lr": 5e-2, "max_grad_norm": 0.1},
        "finetune": {"lr": 5e-3, "batch_size": 4, "epochs": 2, "dropout": 0.25},
    },
)
