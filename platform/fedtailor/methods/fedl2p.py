"""FedL2P: clients learn together how to choose the learning rate of every LoRA matrix for each of them.

Paper: Lee, Kim, Li, Qiu, Hospedales, Huszar, Lane, "FedL2P: Federated Learning to Personalize", NeurIPS 2023, as
adapted to LoRA in FedP2EFT (arXiv 2502.04387, sections 4.1.3, A.4).
    phi         -> SHARED     params "lrnet.*" (LRNet) and "multipliers" (eta_tilde)
    A, B        -> EPHEMERAL  rank r
    E(h), SD(h) -> ctx.client_features
    Q, psi      -> cfg.hypergradient.terms, cfg.hypergradient.psi
Rates: eta_j = eta_tilde_j * clamp(LRNet(features)_j), one for each A and each B.
Client step, `outer_steps` times: fine-tune from scratch on 80 % of the training texts at these rates, then one Adam
step on phi along the hypergradient of the loss on the other 20 % (`methods.fedl2p_hypergradient`). Only phi travels.
Inference: rates, then LoRA of rank r at these rates. One training per budget (FedP2EFT 3.3).
Not in FedP2EFT, taken from the public code: two hidden layers, Xavier-normal weights, the clamp to [0, 1000] and
its straight-through gradient.
Ours: multipliers below zero count as zero (a negative rate climbs), the features are those of all training texts,
the outer losses are taken without dropout, early stopping looks at the whole validation split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.adapters.selected_lora import uniform_selection
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.scope import Scope
from fedtailor.core.settings import Positive, Rate
from fedtailor.evaluation.classification import evaluate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, EarlyStop, Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup, LaneAdam
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.loss import WHOLE_LOGITS
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import clip_lanes
from fedtailor.methods.fedl2p_hypergradient import HypergradientConfig, OuterPairs, rate_derivative
from fedtailor.methods.fedl2p_inner_loop import FineTuned, InnerLoop, fine_tune, split_lanes
from fedtailor.methods.fedl2p_net import MULTIPLIERS, LrNetConfig, RateNet
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.task import TASKS
from fedtailor.training.finetune import FinetuneConfig, budget_lanes, budgets_of, finetune, repeat_lanes

FEW_TEXTS = 5


class FedL2PConfig(Config):
    """Defaults: FedP2EFT A.4."""

    finetune: FinetuneConfig = FinetuneConfig()
    """The inner loop and the personal fine-tuning alike."""
    lrnet: LrNetConfig = LrNetConfig()
    hypergradient: HypergradientConfig = HypergradientConfig()
    outer_steps: Positive = 3
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of each client's training texts that the outer loss is taken on."""
    patience: Positive | None = 50
    """Rounds without a better validation loss before training stops; null: never."""
    personalise_on: Literal["all", "train_split"] = "all"
    """Texts of the final fine-tuning: all training texts, like every other method, or the 80 % (reference)."""
    constant_correction: bool = False
    """The reference's inner Adam corrects its moments by 1 - beta instead of 1 - beta^t."""
    hold_first: bool = False
    """The reference's inner loop makes no update on an epoch's first batch and adds its gradient to the second's."""
    one_for_all: bool = False
    """Train phi once, at the largest rank, and use it at every budget: its rates do not depend on the rank."""
    server_lr: Rate = 1.0
    reference: bool = False
    """Every deviation of the public code at once; single switches win over it."""

    @model_validator(mode="before")
    @classmethod
    def _as_reference(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value.get("reference"):
            return value
        sections = {name: value.get(name, {}) for name in ("finetune", "lrnet", "hypergradient")}
        if not all(isinstance(section, Mapping) for section in sections.values()):
            return value
        return {
            "personalise_on": "train_split",
            "constant_correction": True,
            "hold_first": True,
            **value,
            "finetune": {"max_grad_norm": 1.0, **sections["finetune"]},
            "lrnet": {"clip": "norm", "weights": "bfloat16", "features_eps": 1e-5, **sections["lrnet"]},
            "hypergradient": {"form": "implicit", "share_losses": True, **sections["hypergradient"]},
        }

    @field_validator("finetune")
    @classmethod
    def _in_epochs(cls, value: FinetuneConfig) -> FinetuneConfig:
        if value.local_steps is not None:
            raise ValueError(
                f"'fedl2p.finetune.local_steps' = {value.local_steps}: FedL2P's inner loop runs in epochs (allowed: "
                "null, with fedl2p.finetune.epochs)"
            )
        return value

    @classmethod
    def for_task(cls, given: Mapping[str, Any], task: TaskConfig) -> Mapping[str, Any]:
        """The public code pads every text of a classification task to the task's length, and counts the padding."""
        lrnet = given.get("lrnet", {})
        if not given.get("reference") or TASKS[task.name].kind == "generation" or not isinstance(lrnet, Mapping):
            return given
        return {**given, "lrnet": {"features_pad_to": task.max_length, **lrnet}}


@dataclass(frozen=True)
class LearnRates:
    """Fine-tune, look at the validation loss, move phi."""

    cfg: FedL2PConfig
    net: RateNet
    adapter: LoraAdapter

    def __call__(self, ctx: ClientContext) -> Report:
        """One client's part of a round."""
        cfg, pairs_each = self.cfg, self.cfg.hypergradient.pairs
        own, validation = split_lanes(ctx, cfg.validation)
        _warn_of_few_texts(ctx)
        pairs = OuterPairs.draw(own, validation, cfg.outer_steps, pairs_each)
        features, start = self.net.features(ctx), ctx.params.flat(Scope.EPHEMERAL).clone()
        optimizer = LaneAdam(ctx.params, self._outer_groups(ctx.net))
        metrics: dict[str, Tensor] = {}
        clipped = torch.zeros_like(ctx.sizes)
        for step in range(cfg.outer_steps):
            ctx.params.flat(Scope.EPHEMERAL).copy_(start)
            rates, raw = self.net(ctx.params, features)
            tuned = self._fine_tune(own, rates.detach(), step)
            if not step:
                # Of the phi received: early stopping compares rounds by it.
                seen = {"train_loss": tuned.loss, "val_loss": self._loss(own, validation)}
                metrics = seen | self.net.measure(rates.detach(), raw.detach())
            v = pairs.cotangents(self.adapter, step, cfg.hypergradient)
            optimizer.zero_grad()
            (rates * rate_derivative(v, tuned.direction)).sum().backward()  # type: ignore[no-untyped-call]
            clipped += self._clip(optimizer) / cfg.outer_steps
            optimizer.step(len(ctx.lanes))
        return Report({**metrics, "hypergradient_clipped_share": clipped})

    def _outer_groups(self, net: LaneNet) -> list[AdamGroup]:
        cfg = self.cfg.lrnet
        rounded = torch.bfloat16 if cfg.weights == "bfloat16" else None
        names = tuple(spec.name for spec in self.net.specs(net) if spec.name != MULTIPLIERS)
        return [
            AdamGroup(names, cfg.lr, rounded=rounded),
            AdamGroup((MULTIPLIERS,), cfg.multiplier_lr, rounded=rounded),
        ]

    def _fine_tune(self, own: ClientContext, rates: Tensor, step: int) -> FineTuned:
        cfg, how = self.cfg, self.cfg.finetune
        loop = InnerLoop(
            how.epochs, how.batch_size, f"train/{step}", how.max_grad_norm, how.dropout,
            cfg.constant_correction, cfg.hold_first,
        )  # fmt: skip
        return fine_tune(own, rates, loop)

    def _loss(self, own: ClientContext, validation: Sequence[Examples]) -> Tensor:
        """Mean cross-entropy over the whole validation split, (K,)."""
        width = max(int(v.lengths.max()) for v in validation)
        tokens = self.cfg.finetune.batch_size * len(validation) * width
        if validation[0].prompt_length is not None:
            tokens = min(tokens, WHOLE_LOGITS // own.net.config.vocab_size)
        scores = evaluate(own.net.logits, validation, own.pad_id, tokens, own.net.device)
        return torch.tensor([score.loss_sum / score.count for score in scores], dtype=torch.float64)

    def _clip(self, optimizer: LaneAdam) -> Tensor:
        """Clips phi's gradient in place; the share of its elements that were cut, or of its two norms, (K,)."""
        cfg = self.cfg.lrnet
        if cfg.clip == "norm":
            norms = [clip_lanes(slices, cfg.clip_at, len(slices[0].grad)) for slices in optimizer.slices]
            return (torch.stack(norms) > cfg.clip_at).to(norms[0].dtype).mean(0)
        flat = [s.grad for slices in optimizer.slices for s in slices]
        cut = (torch.cat(flat, 1).abs() > cfg.clip_at).to(flat[0].dtype).mean(1)
        for grad in flat:
            grad.clamp_(-cfg.clip_at, cfg.clip_at)
        return cut


def _warn_of_few_texts(ctx: ClientContext) -> None:
    for lane in ctx.lanes:
        if lane.size == 1:
            ctx.warn(lane, "one training text: FedL2P validates its learning rates on the text that it trains on")
        elif lane.size < FEW_TEXTS:
            ctx.warn(lane, f"{lane.size} training texts: FedL2P validates its learning rates on a single one of them")


@dataclass(frozen=True)
class GeneratedRates:
    """Ask the net, then LoRA of rank r at these rates."""

    cfg: FedL2PConfig
    net: RateNet
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Personalises every client with the rates that the net gives it."""
        with torch.no_grad():
            rates, raw = self.net(ctx.params, self.net.features(ctx))
        metrics = {name: repeat_lanes(value, ctx) for name, value in self.net.measure(rates, raw).items()}
        used = split_lanes(ctx, self.cfg.validation)[0] if self.cfg.personalise_on == "train_split" else ctx
        lanes = budget_lanes(used)
        selection = uniform_selection(budgets_of(lanes), len(ctx.net.adapted), 2 * ctx.r_max, ctx.sizes)
        wide = repeat_lanes(rates, ctx)
        return finetune(lanes, selection, self.cfg.finetune, selects_ranks=False, metrics=metrics, rates=wide)


def _needs(cfg: FedL2PConfig) -> frozenset[Capability]:
    """Without Neumann terms the hypergradient needs no Hessian: the first-order option for large models."""
    return frozenset() if cfg.hypergradient.first_order else frozenset({Capability.SECOND_ORDER})


def build(cfg: FedL2PConfig, r_max: int) -> Method:
    """FedL2P for LoRA of rank ``r_max``."""
    net = RateNet(cfg.lrnet, cfg.finetune.lr)
    adapter = LoraAdapter(r_max, cfg.finetune.scale, Scope.EPHEMERAL)
    return Method(
        name="fedl2p",
        adapter=adapter,
        modules=(net,),
        local_update=LearnRates(cfg, net, adapter),
        personaliser=GeneratedRates(cfg, net),
        aggregator=WeightedMean(),
        server=ServerSgd(cfg.server_lr),
        requires=_needs(cfg),
        batch_size=cfg.finetune.batch_size,
        epochs=cfg.outer_steps * cfg.finetune.epochs,
        budget_epochs=cfg.finetune.epochs,
        per_budget=not cfg.one_for_all,
        early_stop=EarlyStop("val_loss", cfg.patience) if cfg.patience else None,
    )


ENTRY = MethodEntry(
    name="fedl2p",
    config=FedL2PConfig,
    build=build,
    title="FedL2P",
    summary="federated net for the learning rates of LoRA (Lee et al. 2023)",
    colour="#009e73",
    marker="v",
    tiny={
        "finetune": {"lr": 5e-3, "batch_size": 4, "epochs": 2, "max_grad_norm": 0.1},
        "lrnet": {"lr": 1e-2, "multiplier_lr": 1e-3},
        "hypergradient": {"pairs": 3},
    },
)
