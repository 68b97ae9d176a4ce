"""FedDPA as its authors have it, for instructions: two LoRA that answer together, weighted for every input anew.

Paper: Yang, Long, Shen, Jiang, Blumenstein, "Dual-Personalizing Adapter for Federated Foundation Models", NeurIPS 2024
(arXiv 2403.19211), sections 4.2 (forms T and F) and 4.3 (instance-wise dynamic weighting). The rest is in
`methods.feddpa`.
    h = W x + (1 - w) s B_g A_g x + w s B_l A_l x      g: global, l: local
    w = w_max * mean over S of cos(e(x), e(x_s)), at least 0, one for each prompt x
e is the last layer's state of a prompt's last token under the local LoRA alone, x_s are S training prompts of the
client. As in the public code, but that the S prompts are drawn once per client instead of once per input, and that w is
found before anything is answered: there, batches of answers are made before the weights are.
A client without a local LoRA of its own (form T, and no round met it) answers with the global one, w = 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedtailor.adapters.lora import AdapterPair, LoraAdapter
from fedtailor.core.errors import CapabilityError
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Personalised, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import make_batch, prompt_lengths
from fedtailor.lanes.net import LaneNet
from fedtailor.methods.feddpa_config import FedDpaConfig
from fedtailor.training.local import Training, train


@dataclass(frozen=True)
class InstanceWeight:
    """`LaneNet.weigh`: w of every row.

    Args:
        net: with the global LoRA under the local one.
        known: mean of the lanes' normalised e(x_s), (K, d): its product with a normalised e(x) is the mean cosine.
        most: w_max.
    """

    net: LaneNet
    known: Tensor
    most: float

    @torch.no_grad()
    def __call__(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Of tokens (k, b, T) with prompts of these lengths (k, b): (k, b)."""
        alike = torch.einsum("kbd,kd->kb", local_states(self.net, ids, lengths), self.net.state.running(self.known))
        return self.most * alike.clamp_min(0)


def local_states(net: LaneNet, ids: Tensor, lengths: Tensor) -> Tensor:
    """E of every prompt, normalised, (k, b, d)."""
    net.state.blend = torch.ones(1, 1, device=net.device)
    return normalize(net.last_states(ids, lengths), dim=-1)


@dataclass(frozen=True)
class DualTraining:
    """Rounds and models of the forms T and F.

    Args:
        cfg: configuration, with ``form`` t or f.
        pair: the global LoRA and the local one.
    """

    cfg: FedDpaConfig
    pair: AdapterPair

    def __call__(self, ctx: ClientContext) -> Report:
        """A round: in form T the local LoRA first, on what was received; then the global one by itself.

        In the first round there is nothing to be trained on top of yet.
        """
        metrics = {}
        if self.cfg.form == "t" and ctx.round:
            self.pair.switch(ctx.net, ctx.params, "both")
            ctx.net.state.blend = torch.full((1, 1), self.cfg.train_weight, device=ctx.net.device)
            metrics["local_train_loss"] = self.train(ctx, self.pair.second, "local")
        self.pair.switch(ctx.net, ctx.params, "first")
        return Report({"train_loss": self.train(ctx, self.pair.first, "train")} | metrics)

    def train(self, ctx: ClientContext, part: LoraAdapter, purpose: str) -> Tensor:
        """Epochs on one of the two; mean loss, (K,)."""
        cfg = self.cfg
        how = Training(cfg.epochs, cfg.batch_size, purpose, dropout=cfg.dropout, steps=cfg.local_steps)
        return train(ctx, [AdamGroup(part.names(ctx.net), cfg.lr)], how).loss


@dataclass(frozen=True)
class DualModel:
    """A client's model: both LoRA, weighted by the input. In form F the local one is made here, from the global one."""

    training: DualTraining
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Binds both, and the weights; ``instance_weight`` is their mean over the client's known prompts.

        Raises:
            CapabilityError: a model that does not get its input by rows.
        """
        net, cfg, pair = ctx.net, self.training.cfg, self.training.pair
        if not net.state.fused:
            raise CapabilityError(f"feddpa.form={cfg.form} weighs rows, and {net.one_by_one}; use feddpa.form=sum")
        metrics: Mapping[str, Tensor] = {}
        if cfg.form == "f":
            with torch.no_grad():
                for own, common in zip(pair.second.names(net), pair.first.names(net), strict=True):
                    ctx.params[own].copy_(ctx.params[common])
            pair.switch(net, ctx.params, "second")
            metrics = {"train_loss": self.training.train(ctx, pair.second, "personalise")}
        pair.switch(net, ctx.params, "both")
        net.weigh, own_weight = self._weights(ctx)
        return Personalised(ctx.lanes, net.logits, metrics={**metrics, "instance_weight": own_weight})

    @torch.no_grad()
    def _weights(self, ctx: ClientContext) -> tuple[InstanceWeight, Tensor]:
        net, cfg, rows = ctx.net, self.training.cfg, []
        for lane in ctx.lanes:
            rng = numpy_rng(ctx.seed, ctx.stage, ctx.round, lane.client.id, "instances")
            rows.append(rng.choice(lane.size, size=min(cfg.instances, lane.size), replace=False))
        batch = make_batch([lane.train for lane in ctx.lanes], rows, ctx.pad_id, net.device)
        states = local_states(net, batch.input_ids, prompt_lengths(batch))
        there = torch.tensor([len(own) for own in rows], device=net.device).unsqueeze(1)
        counted = torch.arange(states.shape[1], device=net.device) < there
        if cfg.form == "t":
            counted = counted & ~ctx.fresh.unsqueeze(1)
        known = (states * counted.unsqueeze(2)).sum(1) / there
        weights = cfg.max_weight * torch.einsum("kbd,kd->kb", states, known).clamp_min(0)
        net.state.blend = None
        return InstanceWeight(net, known, cfg.max_weight), (weights * counted).sum(1) / there.squeeze(1)
