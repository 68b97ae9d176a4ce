r"""Per-FedAvg on LoRA: a common LoRA from which one step on a client's data leads to a good model for it.

Papers: Fallah, Mokhtari, Ozdaglar, "Personalized Federated Learning: A Meta-Learning Approach", NeurIPS 2020 (arXiv
2002.07948), Algorithm 1 and section 5; as the baseline Per-FedAvg-LoRA in Hao et al. (PF2LoRA, arXiv 2503.03920),
Appendix A.
    x = (A, B), head  -> SHARED    "lora_*", the head's own weights
    AdamW's state     -> PRIVATE   "adam.*"; with head=client the head, too
    alpha, beta, tau  -> cfg.inner_lr (a below), cfg.lr, cfg.local_steps
A step, with batches pi and xi:
    x' = x - a grad F(x; pi),   v = grad F(x'; xi)
    h  = (I - a H(x; pi)) v,    x by AdamW on h
H is the Hessian (``second``), a difference of two gradients (``hessian_free``, Per-FedAvg (HF)) or left out (``first``,
Per-FedAvg (FO)). The client's model is x after one inner step on its training data.
Ours: AdamW in the place of SGD, as in PF2LoRA's experiments. Fallah et al. draw a third batch for H; by the FLOPs of
PF2LoRA's Table 22 it is pi, whose graph then serves both derivatives (``batches``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.spectrum import singular_values
from fedtailor.core.settings import Natural, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method, MethodEntry, Personalised, Report
from fedtailor.lanes.adam import AdamGroup, LaneOptimizer, LaneSgd
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.params import LaneParams
from fedtailor.training.common_lora import CommonLoraConfig, CommonTraining, mean_over_steps
from fedtailor.training.local import train
from fedtailor.training.second_order import (
    again,
    difference,
    dropout_state,
    gradient,
    gradients,
    product,
    restore_dropout,
    slopes,
)


class PerFedAvgLoraConfig(CommonLoraConfig):
    """Defaults: PF2LoRA's Table 6 (MNLI, SST-2, QQP; on QNLI lr 2e-3, on CoLA lr 2e-3 and inner_lr 1e-2)."""

    inner_lr: Annotated[float, Field(ge=0)] = 1e-3
    """a; 0 is HOMLoRA."""
    order: Literal["second", "hessian_free", "first"] = "second"
    batches: Literal[2, 3] = 2
    """2: H is that of pi; 3: of a batch of its own."""
    difference: Rate = 3e-3
    """Length of the step along v that ``order=hessian_free`` takes to either side; about the
    cube root of float32's rounding, where a central difference is best. DARTS takes 1e-2."""
    personal_steps: Natural = 1
    """Inner steps that make the client's model."""


@dataclass(frozen=True)
class MetaSteps:
    """A round: I steps on x.

    Args:
        common: the optimizer of x.
    """

    common: CommonTraining

    def __call__(self, ctx: ClientContext) -> Report:
        """One client's part of a round; ``inner_loss`` is F(x; pi), ``train_loss`` F(x'; xi)."""
        cfg, adapter = _config(self.common), self.common.adapter
        optimizer, how = self.common.begin(ctx), cfg.training("train")
        streams = ["train", "train/inner", *(["train/hessian"] * (cfg.batches == 3 and cfg.order != "first"))]
        # x' has leaves of its own: the graph at x is still wanted when it is there.
        ahead = LaneParams(adapter.specs(ctx.net), ctx.params.lanes, ctx.net.device, ctx.net.param_dtype)
        try:
            found = mean_over_steps(ctx, how, streams, lambda batches: self._step(ctx, ahead, optimizer, batches))
        finally:
            adapter.bind(ctx.net, ctx.params)
        self.common.end(ctx, optimizer)
        return Report(found)

    def _step(
        self, ctx: ClientContext, ahead: LaneParams, optimizer: LaneOptimizer, batches: Sequence[LaneBatch]
    ) -> dict[str, Tensor]:
        cfg, adapter, net = _config(self.common), self.common.adapter, ctx.net
        names, outer, inner = adapter.names(net), batches[0], batches[1]
        x, masks, graphs = [ctx.params[name] for name in names], dropout_state(ctx), None
        if cfg.order == "second" and cfg.batches == 2:
            graphs, inner_loss = slopes(ctx, inner, x)
            slope = [sum(parts).detach() for parts in zip(*graphs, strict=True)]
        else:
            inner_loss = gradient(ctx, inner)
            slope = gradients(ctx, names)
        for name, start, s in zip(names, x, slope, strict=True):
            ahead.set(name, start.detach() - cfg.inner_lr * s)
        adapter.bind(net, ahead)
        there = replace(ctx, params=ahead)
        loss = gradient(there, outer)
        v = gradients(there, names)
        adapter.bind(net, ctx.params)
        hessian = batches[-1] if cfg.batches == 3 else inner
        if graphs is not None:
            curved = [sum(parts) for parts in zip(*(again(part, x, v) for part in graphs), strict=True)]
        elif cfg.order == "first":
            curved = [torch.zeros_like(t) for t in v]
        elif cfg.order == "second":
            curved = product(ctx, hessian, x, x, v)
        else:
            if hessian is inner:
                restore_dropout(ctx, masks)
            curved = difference(ctx, hessian, names, names, v, cfg.difference)
        with torch.no_grad():
            for leaf, first, second in zip(x, v, curved, strict=True):
                assert leaf.grad is not None
                leaf.grad.copy_(first - cfg.inner_lr * second)
        optimizer.step(outer.lanes)
        return {"inner_loss": inner_loss, "train_loss": loss}


def _config(common: CommonTraining) -> PerFedAvgLoraConfig:
    assert isinstance(common.cfg, PerFedAvgLoraConfig)
    return common.cfg


@dataclass(frozen=True)
class OneStepAway:
    """The client's model: x after inner steps on its training data."""

    common: CommonTraining
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Takes the inner steps, for clients of all pools alike."""
        cfg, adapter = _config(self.common), self.common.adapter
        self.common.train_fresh_heads(ctx)
        metrics = {}
        if cfg.personal_steps:
            how = replace(cfg.training("personalise"), steps=cfg.personal_steps)
            steps = LaneSgd(ctx.params, [AdamGroup(adapter.names(ctx.net), cfg.inner_lr)])
            metrics = {"train_loss": train(ctx, steps, how).loss}
        clients = [lane.client.id for lane in ctx.lanes]
        export = partial(adapter.export, ctx.net, ctx.params, clients)
        spectra = singular_values([adapter], ctx.net, ctx.params)
        return Personalised(ctx.lanes, ctx.net.logits, metrics=metrics, spectra=spectra, export=export)


def build(cfg: PerFedAvgLoraConfig, r_max: int) -> Method:
    """Per-FedAvg on a LoRA of rank ``cfg.rank``, whatever the budget."""
    common = CommonTraining(cfg, cfg.adapter())
    return common.method(
        "perfedavg_lora",
        MetaSteps(common),
        OneStepAway(common),
        requires=frozenset({Capability.SECOND_ORDER} if cfg.order == "second" else ()),
        passes={"first": 2, "hessian_free": 4, "second": 3 if cfg.batches == 2 else 4}[cfg.order],
        whole_rows=cfg.batch_size if cfg.order == "second" else 0,
    )


ENTRY = MethodEntry(
    name="perfedavg_lora",
    config=PerFedAvgLoraConfig,
    build=build,
    title="Per-FedAvg-LoRA",
    summary="a common LoRA that one local step makes personal (Fallah et al. 2020)",
    colour="#009988",
    marker="v",
    tiny={"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3, "inner_lr": 0.05, "dropout": 0.2},
)
