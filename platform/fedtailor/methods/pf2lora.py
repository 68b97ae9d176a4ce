r"""PF2LoRA: a common LoRA that is trained for how each client's own small LoRA will answer to it.

Paper: Hao, Wu, Payani, Lee, Liu, "Personalized Federated Fine-tuning for Heterogeneous Data: An Automatic Rank Learning
Approach via Two-Level LoRA" (arXiv 2503.03920), section 4, Algorithm 1. W_k = W0 + s (B A + D_k C_k), s = 1 (Eq. 2).
    x = (A, B), head  -> SHARED    "common_*", the head's own weights
    y_k = (C_k, D_k)  -> PRIVATE   "own_*", rank r~
    AdamW's state     -> PRIVATE   "adam.*"; with head=client the head, too
    eta, alpha, I     -> cfg.lr, cfg.inner_lr, cfg.local_steps
A step, with batches pi and xi, and sg(v) held constant:
    a. y+ = y - alpha grad_y F(x, y; pi)
    b. v = grad_y F(x, y+; xi),  g = grad_x F(x, y+; xi)
    c. h = g - alpha d/dx <grad_y F(x, y; xi), sg(v)>, the gradient of F(x, y+(x); xi) by x if pi = xi
    d. x by AdamW on h;  y = y+
    e. every I steps x becomes the plain mean of all clients.
Order of the derivatives in c: `training.second_order`. ``joint`` trains x and y at one point, each by its own gradient
(the paper's "bilevel off"); ``first`` drops the term of c.
Ours: the paper's c. takes xi~ and zeta for v and for the term; its FLOPs (Table 22) say that they are xi (``batches``).
The pseudocode writes y before c, whose term is at the old y in Eq. 4 (``cross_at``). Alg. 1 averages after the first of
every I steps, so that its clients end I - 1 steps away from their mean (``sync=alg1``, ``evaluate=local``). C continues
the draw of A, so x and y start as one LoRA of rank r + r~, D = 0. A client that no round met takes I steps on y at the
common x. The client's model is x plus y, one LoRA of rank r + r~ when exported; it serves every budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.lora import AdapterPair, LoraAdapter, export_stacked
from fedtailor.adapters.spectrum import singular_values
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import Natural, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup, LaneOptimizer, LaneSgd
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import Parameters
from fedtailor.training.common_lora import CommonLoraConfig, CommonTraining, keep_trained, mean_over_steps
from fedtailor.training.local import train
from fedtailor.training.second_order import (
    difference,
    dropout_state,
    gradient,
    gradients,
    product,
    restore_dropout,
)


class Pf2LoraConfig(CommonLoraConfig):
    """Defaults: Tables 6 and 7 (MNLI, SST-2, QQP, QNLI; on CoLA lr 2e-3, inner_lr 1e-4)."""

    inner_lr: Annotated[float, Field(ge=0)] = 1e-3
    """alpha, of y."""
    private_rank: Natural = 2
    """r~; 0: no y, which is HOMLoRA."""
    order: Literal["second", "finite_difference", "first", "joint"] = "second"
    batches: Literal[2, 4] = 2
    """2: xi is the batch of v and of the term in c, too; 4: each has one of its own."""
    cross_at: Literal["old", "new"] = "old"
    """The term in c at y (Eq. 4) or at y+."""
    difference: Rate = 3e-3
    """Length of the step along v that ``order=finite_difference`` takes to either side; about the
    cube root of float32's rounding, where a central difference is best. DARTS takes 1e-2."""
    sync: Literal["end", "alg1"] = "end"
    """Averages after steps I, 2 I, ..., or after steps 1, I + 1, ..."""
    evaluate: Literal["averaged", "local"] = "averaged"
    """The client's x in the end: the mean, or its own: before the last mean (sync=end), I - 1 steps later (alg1)."""


@dataclass(frozen=True)
class OwnCommon:
    """PRIVATE "local" (P,): the client's x as it was before the last mean.

    Args:
        common: declares x.
    """

    common: LoraAdapter

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """All SHARED numbers in flat order."""
        shared = (spec.size for spec in self.common.specs(net) if spec.scope is Scope.SHARED)
        return [ParamSpec("local", (sum(shared),), Scope.PRIVATE)]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Zero: nobody reads it before it is written."""
        return {}


@dataclass(frozen=True)
class TwoLevels:
    """Steps on x and y.

    Args:
        cfg: switches and rates.
        pair: x, then y.
        common: the optimizer of x.
    """

    cfg: Pf2LoraConfig
    pair: AdapterPair
    common: CommonTraining

    def train(self, ctx: ClientContext, steps: int, purpose: str) -> dict[str, Tensor]:
        """So many steps from where the clients are; means over them, (K,) each.

        Metrics: ``train_loss`` F(x, y+; xi), at the old y with order=joint; ``inner_loss`` F(x, y; pi);
        ``cross_share`` the length of the term in c as a share of that of g, with orders that have one.
        """
        self.pair.switch(ctx.net, ctx.params, "joint")
        optimizer = self.common.begin(ctx)
        how = replace(self.cfg.training(purpose), steps=steps)
        streams = [purpose, f"{purpose}/inner", *([f"{purpose}/v", f"{purpose}/cross"] * (self.cfg.batches == 4))]
        found = mean_over_steps(ctx, how, streams, lambda batches: self._step(ctx, optimizer, batches))
        self.common.end(ctx, optimizer)
        return found

    def _step(self, ctx: ClientContext, optimizer: LaneOptimizer, batches: Sequence[LaneBatch]) -> dict[str, Tensor]:
        cfg, y = self.cfg, self.pair.second.names(ctx.net)
        outer, inner = batches[:2]
        if not cfg.private_rank:
            found = {"train_loss": gradient(ctx, outer)}
            optimizer.step(outer.lanes)
            return found
        found = {"inner_loss": gradient(ctx, inner)}
        slope = gradients(ctx, y)
        if cfg.order == "joint":
            found["train_loss"] = gradient(ctx, outer)
            optimizer.step(outer.lanes)
            self._descend(ctx, y, slope)
            return found
        old = [ctx.params[name].detach().clone() for name in y]
        self._descend(ctx, y, slope)
        masks = dropout_state(ctx)
        found["train_loss"] = gradient(ctx, outer)
        if cfg.order != "first":
            found["cross_share"] = self._add_term(ctx, old, masks, batches)
        optimizer.step(outer.lanes)
        return found

    def _add_term(
        self, ctx: ClientContext, old: Sequence[Tensor], masks: Sequence[Tensor], batches: Sequence[LaneBatch]
    ) -> Tensor:
        """Makes h of the g that is in the gradients of x; the term's share of g, (K,)."""
        cfg, net, params = self.cfg, ctx.net, ctx.params
        x, y = self.pair.first.names(net), self.pair.second.names(net)
        g, v, batch = gradients(ctx, x), gradients(ctx, y), batches[0]
        if cfg.batches == 4:
            gradient(ctx, batches[2])
            v, batch, masks = gradients(ctx, y), batches[3], dropout_state(ctx)
        new = [params[name].detach().clone() for name in y]
        if cfg.cross_at == "old":
            self._put(ctx, y, old)
        restore_dropout(ctx, masks)
        if cfg.order == "second":
            term = product(ctx, batch, [params[name] for name in y], [params[name] for name in x], v)
        else:
            term = difference(ctx, batch, y, x, v, cfg.difference)
        self._put(ctx, y, new)
        with torch.no_grad():
            for name, first, second in zip(x, g, term, strict=True):
                grad = params[name].grad
                assert grad is not None
                grad.copy_(first - cfg.inner_lr * second)
        return cfg.inner_lr * _length(term) / _length(g).clamp_min(torch.finfo(g[0].dtype).tiny)

    def _descend(self, ctx: ClientContext, names: Sequence[str], slope: Sequence[Tensor]) -> None:
        moved = [ctx.params[name].detach() - self.cfg.inner_lr * s for name, s in zip(names, slope, strict=True)]
        self._put(ctx, names, moved)

    @staticmethod
    def _put(ctx: ClientContext, names: Sequence[str], values: Sequence[Tensor]) -> None:
        for name, value in zip(names, values, strict=True):
            ctx.params.set(name, value)


def _length(parts: Sequence[Tensor]) -> Tensor:
    """Euclidean length of each lane, (K,)."""
    return torch.stack([part.detach().flatten(1).square().sum(1) for part in parts]).sum(0).sqrt()


@dataclass(frozen=True)
class BilevelRound:
    """A round: I steps, of which the first round takes one alone with ``sync=alg1``."""

    levels: TwoLevels

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received x and the client's y."""
        cfg = self.levels.cfg
        steps = 1 if cfg.sync == "alg1" and not ctx.round else cfg.local_steps
        metrics = self.levels.train(ctx, steps, "train")
        if "local" in ctx.params:
            ctx.params.set("local", ctx.params.flat(Scope.SHARED))
        return Report(metrics)


@dataclass(frozen=True)
class CommonAndOwn:
    """The client's model: x plus y."""

    levels: TwoLevels
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Takes the steps that are left, and those of clients that no round met."""
        cfg, pair = self.levels.cfg, self.levels.pair
        self._end_of_rounds(ctx)
        pair.switch(ctx.net, ctx.params, "joint")
        y = pair.second.names(ctx.net)
        if bool(ctx.fresh.any()):
            if cfg.private_rank:
                before = [ctx.params[name].detach().clone() for name in y]
                train(ctx, LaneSgd(ctx.params, [AdamGroup(y, cfg.inner_lr)]), cfg.training("personalise"))
                keep_trained(ctx, y, before)
            self.levels.common.train_fresh_heads(ctx)
        clients = [lane.client.id for lane in ctx.lanes]
        return Personalised(
            ctx.lanes,
            ctx.net.logits,
            metrics={"own_steps_when_new": ctx.fresh.to(ctx.sizes) * cfg.local_steps},
            spectra=singular_values((pair.first, pair.second), ctx.net, ctx.params),
            export=partial(export_stacked, (pair.first, pair.second), ctx.net, ctx.params, clients),
        )

    @torch.no_grad()
    def _end_of_rounds(self, ctx: ClientContext) -> None:
        """With ``evaluate=local``, each client's own x, where rounds have met it."""
        cfg, known = self.levels.cfg, ~ctx.fresh
        if cfg.evaluate == "averaged" or not bool(known.any()):
            return
        if cfg.sync == "end":
            ctx.params.flat(Scope.SHARED)[known] = ctx.params["local"][known]
        elif cfg.local_steps > 1:
            names = [spec.name for spec in self.levels.pair.specs(ctx.net)]
            before = [ctx.params[name].detach().clone() for name in names]
            with torch.enable_grad():
                self.levels.train(ctx, cfg.local_steps - 1, "personalise/local")
            for name, value in zip(names, before, strict=True):
                ctx.params[name][ctx.fresh] = value[ctx.fresh]


def build(cfg: Pf2LoraConfig, r_max: int) -> Method:
    """PF2LoRA of ranks ``cfg.rank`` + ``cfg.private_rank``, whatever the budget."""
    first = cfg.adapter("common")
    own = LoraAdapter(
        cfg.private_rank, cfg.scale, Scope.PRIVATE, targets=cfg.targets, prefix="own", first_row=cfg.rank,
        start=cfg.start,
    )  # fmt: skip
    pair = AdapterPair(first, own)
    levels = TwoLevels(cfg, pair, CommonTraining(cfg, first))
    local: tuple[Parameters, ...] = (OwnCommon(first),) if (cfg.sync, cfg.evaluate) == ("end", "local") else ()
    second = cfg.order == "second" and cfg.private_rank > 0
    return levels.common.method(
        "pf2lora",
        BilevelRound(levels),
        CommonAndOwn(levels),
        adapter=pair,
        modules=(*levels.common.modules, *local),
        requires=frozenset({Capability.SECOND_ORDER} if second else ()),
        passes=1 if not cfg.private_rank else 4 if cfg.order in ("second", "finite_difference") else 2,
        whole_rows=cfg.batch_size if second else 0,
    )


ENTRY = MethodEntry(
    name="pf2lora",
    config=Pf2LoraConfig,
    build=build,
    title="PF²LoRA",
    summary="a common LoRA and a small one per client, by a bilevel step (Hao et al. 2025)",
    colour="#ee3377",
    marker="D",
    tiny={"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3, "inner_lr": 0.05, "dropout": 0.2},
)
