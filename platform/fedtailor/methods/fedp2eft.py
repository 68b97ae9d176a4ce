"""FedP2EFT: clients learn together how to choose LoRA ranks for each of them.

Paper: Lee, Kim, Rezk, Li, Venieris, Hospedales, "FedP2EFT: Federated Learning to Personalize PEFT for Multilingual
LLMs", arXiv 2502.04387. Equations below use the paper's numbering.
    phi          -> SHARED     params "psg.*"   strategy generator (PSG), Eq. 6
    lambda, A, B -> EPHEMERAL  BayesTune-LoRA, Eq. 1, 4, 5
    E(h), SD(h)  -> ctx.client_features
    s            -> cfg.stage1.epochs (steps of Stage 1)
Client step: features -> lambda_hat = PSG -> Stage 1: Eq. 1 from lambda_hat -> Stage 2: regress the PSG on the lambda
found, L1 loss. Only phi travels. Inference: lambda_hat, the r L largest kept and frozen, A and B trained anew.
One training serves every budget up to r_max.
Not in the paper, taken from its public code: PReLU between the layers, h = 2 i, Xavier-normal initialisation with
gain 1e-6 and bias 1e-4 (A.4), clamping to [1e-4, 1e3], ten full-batch Stage-2 steps, the sum (not mean) of |.|.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from fedtailor.adapters.bayestune_lora import BayesTuneLora
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.seeding import torch_rng
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup, LaneAdam
from fedtailor.lanes.features import feature_size
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.task import TASKS
from fedtailor.training.bayestune import REFERENCE, RankSearchConfig, clamp_lambda, search_ranks
from fedtailor.training.finetune import FinetuneConfig, budget_lanes, budgets_of, finetune, repeat_lanes
from fedtailor.training.pruning import RANK_BITS, TieRule, prune, tied_share


class PsgConfig(Config):
    """The strategy generator and its Stage 2."""

    when_absent: ClassVar[Mapping[str, Any]] = {"features_eps": 0.0}
    lr: Rate = 1e-4
    """Adam (A.4)."""
    steps: Positive = 10
    """Full-batch steps on the client's one (features, lambda) pair."""
    hidden_mul: Positive = 2
    gain: Rate = 1e-6
    bias: float = 1e-4
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rounds phi after every step, as the reference's bfloat16 PSG does."""
    features_pad_to: Positive | None = None
    """None: real tokens only. A length: padding up to it counts too, as in the reference, which has the task's."""
    features_eps: Annotated[float, Field(ge=0)] = 1e-5
    """SD(h) = sqrt(variance + features_eps), the reference's constant. Runs from before this key have 0."""
    count_output: bool = False
    """Language models: the input of the output embedding, which carries no adapter, is one more feature pair, as in the
    reference (394 inputs in the place of 392 for Llama-3.2-3B). Without effect on classifiers."""


class FedP2EFTConfig(Config):
    """Defaults: FedP2EFT section 4.1 and A.4."""

    stage1: RankSearchConfig = RankSearchConfig()
    psg: PsgConfig = PsgConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    r_mul: Positive = 2
    """alpha_r_mul: r_init = r_mul * largest budget."""
    ties: TieRule = "rank_then_layer"
    rank_bits: Annotated[int, Field(ge=1, le=53)] = RANK_BITS
    """Mantissa bits of lambda that the ranking looks at; 24, all that a float32 has, compares exactly."""
    server_lr: Annotated[float, Field(gt=0)] = 1.0
    reference: bool = False
    """What the public code does otherwise in training, features, ranking and personalisation, at once; single switches
    win over it. Still ours: lambda, features and the generator's arithmetic are float32 (the public code computes them
    in bfloat16; rank_bits=8 would rank as that does), ties go by `ties` (there by torch.topk, in no stated order), data
    order follows the run's seed, and prompts of a generation task are not padded (there to the longest of four)."""

    @model_validator(mode="before")
    @classmethod
    def _as_reference(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not value.get("reference"):
            return value
        stage1, psg, finetune = (value.get(name, {}) for name in ("stage1", "psg", "finetune"))
        if not all(isinstance(section, Mapping) for section in (stage1, psg, finetune)):
            return value
        return {
            "rank_bits": 24,
            **value,
            "stage1": {**REFERENCE, **stage1},
            "psg": {"weights": "bfloat16", "count_output": True, **psg},
            "finetune": {"max_grad_norm": 1.0, **finetune},
        }

    @classmethod
    def for_task(cls, given: Mapping[str, Any], task: TaskConfig) -> Mapping[str, Any]:
        """The public code pads every text of a classification task to the task's length, and counts the padding."""
        psg = given.get("psg", {})
        if not given.get("reference") or TASKS[task.name].kind == "generation" or not isinstance(psg, Mapping):
            return given
        return {**given, "psg": {"features_pad_to": task.max_length, **psg}}


@dataclass(frozen=True)
class StrategyGenerator:
    """Eq. 6: (i,) features -> Linear -> PReLU -> Linear -> (L, r_init) lambdas, one copy per lane.

    i = 2L, or 2(L + 1) by ``count_output``.
    """

    r_init: int
    cfg: PsgConfig

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Two linear layers and PReLU's slope, all SHARED."""
        i = feature_size(net) if self.cfg.count_output else 2 * len(net.adapted)
        h, o = self.cfg.hidden_mul * i, len(net.adapted) * self.r_init
        shapes = {
            "hidden.weight": (h, i),
            "hidden.bias": (h,),
            "prelu": (1,),
            "out.weight": (o, h),
            "out.bias": (o,),
        }
        return [ParamSpec(f"psg.{name}", shape, Scope.SHARED) for name, shape in shapes.items()]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Weights so small that every lambda starts at the bias, 1e-4."""
        values = {}
        for spec in self.specs(net):
            if len(spec.shape) == 2:
                sd = self.cfg.gain * math.sqrt(2 / sum(spec.shape))
                values[spec.name] = torch.randn(spec.shape, generator=torch_rng(seed, spec.name)) * sd
            else:
                values[spec.name] = torch.full(spec.shape, 0.25 if spec.name == "psg.prelu" else self.cfg.bias)
        return values

    def features(self, ctx: ClientContext) -> Tensor:
        """Its input, (K, i)."""
        return ctx.client_features(self.cfg.features_pad_to, self.cfg.count_output, self.cfg.features_eps)

    def __call__(self, params: LaneParams, features: Tensor) -> Tensor:
        """Features (K, i) to lambda_hat (K, L, r_init), clamped straight-through."""
        hidden = torch.baddbmm(
            params["psg.hidden.bias"].unsqueeze(2), params["psg.hidden.weight"], features.unsqueeze(2)
        )
        hidden = torch.where(hidden >= 0, hidden, params["psg.prelu"].unsqueeze(2) * hidden)
        out = torch.baddbmm(params["psg.out.bias"].unsqueeze(2), params["psg.out.weight"], hidden).squeeze(2)
        return clamp_lambda(out).view(len(out), -1, self.r_init)


@dataclass(frozen=True)
class TwoStages:
    """Learn lambda on the client, then teach the generator."""

    cfg: FedP2EFTConfig
    psg: StrategyGenerator

    def __call__(self, ctx: ClientContext) -> Report:
        """One client's part of a round."""
        features = self.psg.features(ctx)
        with torch.no_grad():
            start = self.psg(ctx.params, features)
        target, metrics = search_ranks(ctx, start, self.cfg.stage1)
        before, after = self._regress(ctx, features, target)
        found = {f"lambda_target_{key[7:]}" if key.startswith("lambda_") else key: v for key, v in metrics.items()}
        return Report({**found, "psg_loss": before, "psg_loss_after": after})

    def _regress(self, ctx: ClientContext, features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Stage 2: L1 on the lambda found. Returns the mean |error| per output before and after, (K,)."""
        names = tuple(spec.name for spec in self.psg.specs(ctx.net))
        rounded = torch.bfloat16 if self.cfg.psg.weights == "bfloat16" else None
        optimizer = LaneAdam(ctx.params, [AdamGroup(names, self.cfg.psg.lr, rounded=rounded)])
        errors = []
        for _ in range(self.cfg.psg.steps):
            optimizer.zero_grad()
            error = (self.psg(ctx.params, features) - target).abs().sum((1, 2))
            error.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step(len(ctx.lanes))
            errors.append(error.detach())
        with torch.no_grad():
            errors.append((self.psg(ctx.params, features) - target).abs().sum((1, 2)))
        outputs = target[0].numel()
        return errors[0] / outputs, errors[-1] / outputs


@dataclass(frozen=True)
class GeneratedRanks:
    """Ask the generator, prune, fine-tune."""

    cfg: FedP2EFTConfig
    psg: StrategyGenerator
    budgeted: bool = True

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Personalises every client with the ranks that the generator gives it."""
        with torch.no_grad():
            lam = self.psg(ctx.params, self.psg.features(ctx))
        lanes = budget_lanes(ctx)
        wide = repeat_lanes(lam, ctx)
        selection = prune(wide, budgets_of(lanes), self.cfg.ties, self.cfg.rank_bits)
        tied = {"tied_at_threshold": tied_share(wide, selection, self.cfg.rank_bits)}
        return finetune(lanes, selection, self.cfg.finetune, selects_ranks=True, strategy=lam, metrics=tied)


def build(cfg: FedP2EFTConfig, r_max: int) -> Method:
    """FedP2EFT for budgets up to ``r_max``."""
    psg = StrategyGenerator(cfg.r_mul * r_max, cfg.psg)
    return Method(
        name="fedp2eft",
        adapter=BayesTuneLora(psg.r_init, cfg.finetune.scale),
        modules=(psg,),
        local_update=TwoStages(cfg, psg),
        personaliser=GeneratedRanks(cfg, psg),
        aggregator=WeightedMean(),
        server=ServerSgd(cfg.server_lr),
        batch_size=max(cfg.stage1.batch_size, cfg.finetune.batch_size),
        epochs=cfg.stage1.epochs,
        budget_epochs=cfg.finetune.epochs,
    )


ENTRY = MethodEntry(
    name="fedp2eft",
    config=FedP2EFTConfig,
    build=build,
    title="FedP²EFT",
    summary="federated strategy generator for LoRA ranks (Lee et al. 2025)",
    colour="#d55e00",
    marker="D",
    tiny={
        "stage1": {"lr": 5e-3, "batch_size": 4, "epochs": 2, "lambda_lr": 5e-2},
        "psg": {"lr": 1e-2},
        "finetune": {"lr": 5e-3, "batch_size": 4, "epochs": 2},
    },
)
