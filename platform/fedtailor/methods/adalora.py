"""AdaLoRA: every client prunes its own ranks while it trains, once per budget.

Paper: Zhang, Chen, Bukharin, Karampatziakis, He, Cheng, Chen, Zhao, "AdaLoRA: Adaptive Budget Allocation for
Parameter-Efficient Fine-Tuning", ICLR 2023 (arXiv 2303.10512); as a baseline of FedP2EFT (arXiv 2502.04387, A.4).
    P, Lambda, Q   -> EPHEMERAL  params "lora_B", "lora_E", "lora_A"
    b^(0), b^(T)   -> init_mul * r, r (ranks per layer)
    t_i, t_f       -> cfg.t_init, cfg.t_final (shares of the client's own number of steps)
    Delta_T, gamma -> cfg.delta_t, cfg.orth
    beta_1, beta_2 -> cfg.beta1, cfg.beta2
Importance, budget and masks are peft's RankAllocator. Three things are peft's, too, since the grids are for them: s is
alpha / (init_r + 1e-5), the penalty is a mean of norms (the paper: a sum of squares), and E starts at zero.
A client too small for the schedule gets its final mask after the last step, so every client keeps r L ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedtailor.adapters.peft_export import export_adapter
from fedtailor.adapters.svd_lora import SvdLanes, SvdLora, TrainedSvd, orthogonality, svd_names
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import lane_losses
from fedtailor.methods.adalora_budget import RankBudget, Schedule
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import budget_lanes, budgets_of
from fedtailor.training.local import Training, train

Share = Annotated[float, Field(ge=0, lt=1)]
Decay = Annotated[float, Field(gt=0, lt=1)]
REFERENCE: Final[Mapping[str, Any]] = {"alpha": 8.0, "max_grad_norm": 1.0, "orth": 0.0, "final_mask": "if_reached"}
"""Switches that give FedP2EFT's public code's behaviour. It sets gamma but no task type, and peft then never calls the
forward that adds the penalty (peft's issue 432)."""


class AdaLoraConfig(Config):
    """Defaults: FedP2EFT A.4."""

    lr: Rate = 1e-3
    epochs: Positive = 2
    batch_size: Positive = 32
    init_mul: Annotated[float, Field(ge=1)] = 1.5
    """Ranks per layer at first: init_mul * r, rounded up. 1: nothing is pruned, all layers keep rank r."""
    t_init: Share = 0.1
    """Share of the steps before pruning begins, rounded down."""
    t_final: Share = 0.3
    """Share of the steps after pruning has ended, rounded down."""
    delta_t: Positive = 1
    """Steps between two masks."""
    orth: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the penalty that keeps singular vectors orthonormal; without effect in the reference."""
    beta1: Decay = 0.85
    beta2: Decay = 0.85
    alpha: Rate | None = None
    """s = alpha / (init_r + 1e-5). None: 2 * init_r, so that s is 2 as for LoRA; the reference leaves peft's 8."""
    max_grad_norm: Rate | None = None
    """The reference clips at 1.0 (its trainer's default); the paper mentions none."""
    final_mask: Literal["always", "if_reached"] = "always"
    """if_reached: as in the reference, clients of few steps (below 1 / t_final) stay above their budget, with a
    warning; their ranks are then not counted as chosen."""
    reference: bool = False
    """Every deviation of the public code at once; single switches win over it."""

    @model_validator(mode="before")
    @classmethod
    def _as_reference(cls, value: Any) -> Any:
        return {**REFERENCE, **value} if isinstance(value, Mapping) and value.get("reference") else value

    @model_validator(mode="after")
    def _time_to_prune(self) -> AdaLoraConfig:
        if self.t_init + self.t_final >= 1:
            raise ValueError(
                f"'adalora.t_init' ({self.t_init}) and 'adalora.t_final' ({self.t_final}) must add up to less than 1"
            )
        return self

    def init_rank(self, rank: int) -> int:
        """Ranks per layer at first.

        >>> [AdaLoraConfig().init_rank(r) for r in (1, 2, 16)]
        [2, 3, 24]
        """
        return math.ceil(self.init_mul * rank - 1e-9)


@dataclass(frozen=True)
class AdaptiveRanks:
    """Trains one (client, budget) after the other: masks depend on tiny differences between scores, so nothing that
    runs beside a lane may touch its rounding."""

    cfg: AdaLoraConfig
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """One AdaLoRA per client and budget."""
        lanes = budget_lanes(ctx)
        done = [self._lane(lanes.with_lanes((lane,))) for lane in lanes.lanes]
        trained = [one for one, _ in done]
        own = ctx.fork(lanes.lanes, SvdLanes(trained))
        ranks = torch.stack([one.ranks for one in trained])
        fits = [sum(row) == r * ranks.shape[1] for row, r in zip(ranks.tolist(), budgets_of(lanes), strict=True)]

        def export(lane: int, base_ref: str) -> dict[str, bytes]:
            one, modules = trained[lane], ctx.net.modules
            a, b, e = (dict(zip(modules, part, strict=True)) for part in (one.a, one.b, one.e))
            return export_adapter(ctx.net.adapted, a, b, e, one.scale, base_ref, own.lanes[lane].client.id)

        return Personalised(
            lanes=own.lanes,
            logits=ctx.net.logits,
            ranks=ranks,
            selects_ranks=all(fits),
            metrics={name: torch.stack([values[name] for _, values in done]) for name in done[0][1]},
            export=export,
        )

    def _lane(self, ctx: ClientContext) -> tuple[TrainedSvd, dict[str, Tensor]]:
        """Trains the only lane of ``ctx``, and returns its kept ranks and metrics."""
        cfg, rank = self.cfg, int(ctx.lanes[0].budget or 0)
        init = cfg.init_rank(rank)
        scale = (cfg.alpha or 2.0 * init) / (init + 1e-5)
        own = ctx.fork(ctx.lanes, SvdLora(init, scale, cfg.init_rank(max(ctx.r_max, rank))))
        steps = cfg.epochs * math.ceil(ctx.lanes[0].size / cfg.batch_size)
        schedule = Schedule(init, rank, steps, cfg.t_init, cfg.t_final, cfg.delta_t, (cfg.beta1, cfg.beta2))
        # With all ranks kept there is nothing to allocate, and peft's allocator would look for a zeroth-smallest score.
        budget = RankBudget(own.net, own.params, schedule) if init > rank else None
        try:
            loss = self._train(own, budget)
            if budget and cfg.final_mask == "always":
                budget.close()
            keep = budget.kept if budget else torch.ones(len(own.net.adapted), init, dtype=torch.bool)
            trained = TrainedSvd.of(own.net, own.params, keep, scale)
            with torch.no_grad():
                distance = orthogonality(own.net, own.params)[0]
        finally:
            own.net.unbind()
        self._check(own, int(keep.sum()), rank * len(keep))
        return trained, {"train_loss": loss, "orthogonality": distance}

    def _train(self, ctx: ClientContext, budget: RankBudget | None) -> Tensor:
        """Minimises cross-entropy + orth * `orthogonality`; returns the mean cross-entropy over the steps."""
        cfg, total = self.cfg, torch.zeros((), dtype=torch.float64, device=ctx.net.device)

        def loss(batch: LaneBatch) -> Tensor:
            nonlocal total
            own = lane_losses(ctx.net, batch)
            total = total + own.detach()[0]
            return own + cfg.orth * orthogonality(ctx.net, ctx.params) if cfg.orth else own

        how = Training(cfg.epochs, cfg.batch_size, "personalise", cfg.max_grad_norm)
        groups = [AdamGroup(svd_names(ctx.net), cfg.lr)]
        trace = train(ctx, groups, how, loss, after_step=budget.after_step if budget else None)
        return total / trace.steps[0]

    def _check(self, ctx: ClientContext, kept: int, allowed: int) -> None:
        if kept == allowed:
            return
        if self.cfg.final_mask == "always":
            raise AssertionError(f"{ctx.lanes[0].client.id}: {kept} ranks kept, the budget is {allowed}")
        ctx.warn(ctx.lanes[0], f"AdaLoRA's schedule never came to its final mask: {kept} ranks, {allowed} allowed")


def build(cfg: AdaLoraConfig, r_max: int) -> Method:
    """A client-only method: no rounds."""
    return Method(
        "adalora",
        AdaptiveRanks(cfg),
        WeightedMean(),
        ServerSgd(),
        batch_size=cfg.batch_size,
        budget_epochs=cfg.epochs,
        one_lane=True,
    )


ENTRY = MethodEntry(
    name="adalora",
    config=AdaLoraConfig,
    build=build,
    title="AdaLoRA",
    summary="AdaLoRA per client, ranks pruned while training (Zhang et al. 2023)",
    colour="#56b4e9",
    marker="s",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2},
)
