"""One LoRA that all clients train by local steps and average: what PF2LoRA's methods and baselines have in common.

Paper: Hao, Wu, Payani, Lee, Liu, "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning
Approach via Two-Level LoRA" (arXiv 2503.03920), sections 3 and 6. Its optimizer is one object per client that lives as
long as the client (Algorithm 1): averaging overwrites weights, not moments, which are PRIVATE here (`KeptAdam`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter, Targets
from fedtailor.adapters.start import Start
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import LocalUpdate, Method, Personaliser
from fedtailor.lanes.adam import AdamGroup, LaneAdam, LaneOptimizer, LaneSgd
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams, Parameters
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.local import Training, step_rows, train


class CommonLoraConfig(Config):
    """Defaults: PF2LoRA's GLUE experiments (Tables 6 and 7), and our choice where it says nothing."""

    lr: Rate = 1e-3
    """Of A, B and the head."""
    rank: Positive = 8
    """r."""
    scale: Rate = 1.0
    """s of W + s B A. The paper's Eq. 1 has none; LoRA's own scripts have alpha / r = 2 (RoBERTa), 8 (GPT-2)."""
    targets: Targets = ("query", "value")
    """Layers that get a LoRA: all, ``body``, ``head``, or endings of module paths."""
    start: Start = "lora"
    """A as LoRA draws it and B zero; ``normal_a``: A N(0, 1) and B zero; ``normal``: both N(0, 1); ``orthogonal``: so,
    and a client's own LoRA orthogonal to the common one (PF2LoRA's synthetic task, appendix K)."""
    head: Literal["shared", "frozen", "client"] = "shared"
    """The classification head's own weights, which the paper does not mention: trained and averaged like A and B, left
    as they are, or trained and each client's own (such a head learns the client's label prior)."""
    local_steps: Positive = 10
    """I, iterations between two averages."""
    batch_size: Positive = 16
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's default; the paper is silent."""
    keep_optimizer: bool = True
    """AdamW's moments and step count stay with the client from round to round, as in Algorithm 1; false: every round
    begins with none."""
    mean: Literal["plain", "examples"] = "plain"
    """Every client counts once (Algorithm 1), or by its training examples."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def training(self, purpose: str) -> Training:
        """I steps; see `Training.purpose`."""
        return Training(1, self.batch_size, purpose, dropout=self.dropout, steps=self.local_steps)

    def adapter(self, prefix: str = "lora") -> LoraAdapter:
        """A and B, SHARED, and the head as ``head`` says."""
        own = Scope.PRIVATE if self.head == "client" else None
        return LoraAdapter(
            self.rank, self.scale, Scope.SHARED, targets=self.targets, head=self.head != "frozen", prefix=prefix,
            head_scope=own, start=self.start,
        )  # fmt: skip

    def aggregator(self) -> WeightedMean:
        """The mean that ``mean`` says."""
        return WeightedMean(uniform=self.mean == "plain")

    def kept(self, trained: Callable[[LaneNet], Sequence[ParamSpec]]) -> KeptAdam | None:
        """The optimizer's state over rounds, of parameters with these specs; None where none is kept."""
        return KeptAdam(trained) if self.keep_optimizer and self.optimizer == "adamw" else None

    def fresh_optimizer(self, params: LaneParams, names: Sequence[str]) -> LaneOptimizer:
        """Of the named parameters, at its start."""
        groups = [AdamGroup(tuple(names), self.lr, weight_decay=self.weight_decay)]
        return LaneSgd(params, groups) if self.optimizer == "sgd" else LaneAdam(params, groups)


@dataclass(frozen=True)
class KeptAdam:
    """PRIVATE "adam.first", "adam.second" (P,) and "adam.steps" (1,): an AdamW that goes on from round to round.

    One of a method's ``modules``.

    Args:
        trained: a model's P trained numbers, as specs; those that the optimizer is of.
    """

    trained: Callable[[LaneNet], Sequence[ParamSpec]]

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Both moments, then the step count."""
        size = sum(spec.size for spec in self.trained(net))
        shapes = {"adam.first": (size,), "adam.second": (size,), "adam.steps": (1,)}
        return [ParamSpec(name, shape, Scope.PRIVATE) for name, shape in shapes.items()]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """All zero."""
        return {}

    def load(self, params: LaneParams, optimizer: LaneAdam) -> None:
        """The optimizer goes on from what ``params`` hold."""
        optimizer.load(*(params[name].detach() for name in ("adam.first", "adam.second", "adam.steps")))

    def store(self, params: LaneParams, optimizer: LaneAdam) -> None:
        """Writes the optimizer's state into ``params``."""
        for name, value in zip(("adam.first", "adam.second", "adam.steps"), optimizer.state(), strict=True):
            params.set(name, value)


@dataclass(frozen=True)
class CommonTraining:
    """The optimizer of what `CommonLoraConfig` trains, over rounds.

    Args:
        cfg: how.
        adapter: whose parameters are trained.
    """

    cfg: CommonLoraConfig
    adapter: LoraAdapter

    @property
    def modules(self) -> tuple[Parameters, ...]:
        """What a method of this training declares beside its adapter."""
        kept = self.cfg.kept(self.adapter.specs)
        return (kept,) if kept else ()

    def begin(self, ctx: ClientContext) -> LaneOptimizer:
        """The clients' optimizers, where they were at the end of their last round."""
        optimizer = self.cfg.fresh_optimizer(ctx.params, self.adapter.names(ctx.net))
        if (kept := self.cfg.kept(self.adapter.specs)) and isinstance(optimizer, LaneAdam):
            kept.load(ctx.params, optimizer)
        return optimizer

    def end(self, ctx: ClientContext, optimizer: LaneOptimizer) -> None:
        """Keeps them for the next round."""
        if (kept := self.cfg.kept(self.adapter.specs)) and isinstance(optimizer, LaneAdam):
            kept.store(ctx.params, optimizer)

    def method(self, name: str, local_update: LocalUpdate, personaliser: Personaliser, **more: Any) -> Method:
        """A method of this training, with what all of them have in common; ``more``: further or other fields."""
        usual: dict[str, Any] = {
            "adapter": self.adapter, "modules": self.modules, "aggregator": self.cfg.aggregator(),
            "batch_size": self.cfg.batch_size, "steps": self.cfg.local_steps,
        }  # fmt: skip
        return Method(name, personaliser, server=ServerSgd(), local_update=local_update, **usual | more)

    def train_fresh_heads(self, ctx: ClientContext) -> None:
        """With ``head=client``, I steps on the heads of clients that no round met; the others' stay as they are."""
        names = [spec.name for spec in self.adapter.head_specs(ctx.net) if spec.scope is Scope.PRIVATE]
        if not names or not bool(ctx.fresh.any()):
            return
        before = [ctx.params[name].detach().clone() for name in names]
        train(ctx, self.cfg.fresh_optimizer(ctx.params, names), self.cfg.training("personalise"))
        keep_trained(ctx, names, before)


def mean_over_steps(
    ctx: ClientContext,
    how: Training,
    purposes: Sequence[str],
    step: Callable[[Sequence[LaneBatch]], Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """Steps that each take several batches, one of every purpose's order; means of what they measure, (K,) each."""
    rows = [step_rows(ctx, replace(how, purpose=purpose)) for purpose in purposes]
    if how.dropout:
        ctx.use_dropout(how.dropout, how.purpose)
    ctx.net.train_mode(True)
    sums: dict[str, Tensor] = {}
    try:
        for batches in zip(*map(ctx.batches, rows), strict=True):
            for name, values in step(batches).items():
                sums[name] = sums.get(name, 0) + values
    finally:
        ctx.net.train_mode(False)
    return {name: total / len(rows[0][0]) for name, total in sums.items()}


@torch.no_grad()
def keep_trained(ctx: ClientContext, names: Sequence[str], before: Sequence[Tensor]) -> None:
    """Takes back what was trained of clients that rounds have met: ``before``, (K, *shape) each."""
    known = ~ctx.fresh
    for name, value in zip(names, before, strict=True):
        ctx.params[name][known] = value[known]
