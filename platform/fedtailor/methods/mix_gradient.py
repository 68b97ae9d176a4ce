"""Mixed start by gradient: one weight per layer moves down the gradient of the validation loss.

A rival of `pfedgpt` (Shen et al., EMNLP 2025), after Zhang et al., "FedALA: Adaptive Local Aggregation for Personalized
Federated Learning", AAAI 2023, Eq. 4 to 6.
    theta_global -> SHARED    "global_*"
    theta_local  -> PRIVATE   "local_*", "slow_start.*"
    W            -> 1 - w: FedALA weighs what came, pFedGPT what was there
The clients' w begins at 0, the common LoRA, as FedALA's W begins at 1; a step is
    w <- clip(w - eta Adam(dL/dw), 0, 1),   dL/dw_l = <dL/dA, A_l - A_g> + <dL/dB, B_l - B_g>.
Ours: one weight per adapted layer and not per number, of which there are as many as parameters; Adam in the place of
steps of rate 1, under which the weight of a layer would hardly move; a fixed number of steps from w = 0 in every round,
while FedALA goes on from its last weights until its loss is steady; validation rows in the place of a share of the
training rows; w = 0 and w = 1 are scored beside the outcome and the best wins, as in all mixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import model_validator

from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.lanes.batches import Examples, scoring_batches
from fedtailor.lanes.loss import target_losses
from fedtailor.methods.pfedgpt import TINY
from fedtailor.training.mix_trials import Choice, Trials, by_group
from fedtailor.training.mixed_start import MixConfig, mixed_method
from fedtailor.training.mixing import Mixtures, counted_targets
from fedtailor.training.search import Known, Points, ends
from fedtailor.training.validation_rows import ScoredOn


class MixGradientConfig(MixConfig):
    """Frame and rates are pFedGPT's."""

    weight_steps: Positive = 10
    """Forward and backward passes over V; two passes' work each, HBO's 20 evaluations on a quarter of it are five."""
    weight_lr: Rate = 0.1
    """Adam's step is about that: ten of them lead from 0 to 1."""

    @model_validator(mode="after")
    def _linear(self) -> MixGradientConfig:
        if self.mix != "factors":
            raise ValueError(
                "'mix_gradient.mix' = product is cut to the rank and has no gradient here (allowed: factors)"
            )
        return self


@dataclass(frozen=True)
class Descent:
    """Adam on the weights of the clients of a group."""

    cfg: MixGradientConfig

    def __call__(self, mixtures: Mixtures, lanes: Sequence[int], rows: Sequence[ScoredOn]) -> Choice:
        """Descends, then scores where it came to, w = 0 and w = 1."""
        trials, texts = Trials(mixtures, lanes), [each.high for each in rows]
        layers = len(mixtures.layers)
        spread = [by_group(np.arange(layers))] * len(lanes)
        weights = torch.zeros(len(lanes), layers, dtype=torch.float64)
        adam, w = torch.optim.Adam([weights], self.cfg.weight_lr, eps=1e-12), weights.numpy()
        for _ in range(self.cfg.weight_steps):
            weights.grad = torch.from_numpy(slopes(mixtures, lanes, spread[0](w), texts))
            adam.step()
            weights.clamp_(0, 1)
        trials.evaluations += self.cfg.weight_steps
        trials.tokens += [self.cfg.weight_steps * int(own.lengths.sum()) for own in texts]
        both = ends(layers)
        always = [np.concatenate([both, own.reshape(1, -1)]) for own in w]
        return trials.decided([Known.none(layers)] * len(lanes), spread, rows, 0, always, [both[:1]] * len(lanes))


def slopes(mixtures: Mixtures, clients: Sequence[int], shares: Points, texts: Sequence[Examples]) -> Points:
    """Derivative of each mix's mean loss by the weight of each layer, (n, L); arguments as `Mixtures.losses`."""
    ctx, found = mixtures.ctx, []
    for start, stop in mixtures.groups(texts):
        some, rows = list(clients[start:stop]), texts[start:stop]
        params = mixtures.bound(some, shares[start:stop], trained=True)
        count = torch.zeros(len(some), dtype=torch.float64, device=ctx.net.device)
        for batch, own in scoring_batches(rows, ctx.pad_id, mixtures.tokens(rows), ctx.net.device):
            counted = counted_targets(batch, [len(each) for each in own])
            (target_losses(ctx.net, batch) * counted).sum().backward()  # type: ignore[no-untyped-call]
            count += counted.sum(1)
        products = []
        for spec in params.specs:
            grad = params[spec.name].grad
            assert grad is not None
            difference = mixtures.own[spec.name][some] - mixtures.received[spec.name][some]
            products.append((grad * difference).flatten(1).double().sum(1))
        # A and B of a layer are neighbours.
        found.append((torch.stack(products, 1).view(len(some), -1, 2).sum(2) / count.unsqueeze(1)).cpu().numpy())
    ctx.net.unbind()
    return np.concatenate(found)


def build(cfg: MixGradientConfig, r_max: int) -> Method:
    """Mixed start by gradient; one model for all budgets."""
    count = 2 * cfg.weight_steps + 3
    return mixed_method("mix_gradient", cfg, lambda ctx, memory, own: Descent(cfg), lambda high, low: count * high)


ENTRY = MethodEntry(
    name="mix_gradient",
    config=MixGradientConfig,
    build=build,
    title="Mix, gradient",
    summary="mixes own and common LoRA by gradient on one weight per layer, as FedALA (rival of pFedGPT)",
    tiny={**TINY, "weight_steps": 2},
)
