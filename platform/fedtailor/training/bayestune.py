r"""Sparse rank selection on one client: Eq. 1, 4 and 5 of FedP2EFT (arXiv 2502.04387, section 3.2).

.. math::
    L = CE + \frac{\alpha_s}{N} \sum_{l,i} \frac{\|B_{l,i}\|_1}{\lambda_{l,i}}
           + \frac{\alpha_p}{N} \sum_{l,i} (\log \lambda_{l,i} + 100 \lambda_{l,i})

N is the client's number of training examples; sums run over all layers and ranks. Lambda is clamped by a
straight-through estimator (Bengio et al., 2013): values stop, gradients pass.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.bayestune_lora import LAMBDA, column_norms, use_lambda
from fedtailor.adapters.lora import lora_names
from fedtailor.core.config import Config
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import lane_losses
from fedtailor.training.local import Training, train

LAMBDA_MIN, LAMBDA_MAX = 1e-4, 1e3
FEW_STEPS = 3
REFERENCE = {"max_grad_norm": 1.0, "forward": "raw", "target": "raw", "accumulate_lambda_grad": True}
"""Switches that give the public code's behaviour."""


class _ClampThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, value: Tensor, low: float, high: float | None) -> Tensor:
        return value.clamp(low, high)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def clamp_through(value: Tensor, low: float, high: float | None = None) -> Tensor:
    """Clamps to [low, high], any shape; the gradient passes unchanged."""
    result: Tensor = _ClampThrough.apply(value, low, high)  # type: ignore[no-untyped-call]
    return result


class RankSearchConfig(Config):
    """Stage 1 of FedP2EFT and the search of BayesTune-LoRA (paper: sections 3.2, A.4)."""

    lr: Rate = 1e-4
    """Adam, A and B."""
    lambda_lr: Annotated[float, Field(ge=0)] = 1e-2
    """Adam, lambda; grid 1e-1 ... 1e-4. 0 freezes it."""
    epochs: Positive = 2
    batch_size: Positive = 32
    alpha_s: Annotated[float, Field(ge=0)] = 100.0
    alpha_p: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Clipping of A's and B's gradient; the paper mentions none, the reference uses 1.0."""
    forward: Literal["clamped", "raw"] = "clamped"
    """lambda in the adapter's forward pass; the reference uses the unclamped value."""
    target: Literal["clamped", "raw"] = "clamped"
    """lambda that is handed on; the reference hands on the unclamped value."""
    accumulate_lambda_grad: bool = False
    """The reference never zeroes lambda's gradient, so it sums over all steps."""


def clamp_lambda(value: Tensor) -> Tensor:
    """Clamps to [1e-4, 1e3]; the gradient passes unchanged."""
    return clamp_through(value, LAMBDA_MIN, LAMBDA_MAX)


def sparsity(norms: Tensor, lam: Tensor) -> Tensor:
    """L_s, Eq. 4: sum of ||B_{l,i}||_1 / lambda_{l,i} over layers and ranks; (k, L, r) twice to (k,)."""
    return (norms / lam).sum((1, 2))


def hyper_prior(lam: Tensor) -> Tensor:
    """L_p, Eq. 5: sum of log lambda + 100 lambda over layers and ranks; (k, L, r) to (k,)."""
    return (lam.log() + 100 * lam).sum((1, 2))


def search_ranks(ctx: ClientContext, start: Tensor, cfg: RankSearchConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """Optimises (lambda, A, B) on Eq. 1 from lambda = ``start`` and hands lambda on.

    Args:
        ctx: K lanes with a bound `BayesTuneLora`.
        start: (K, L, r_init).
        cfg: rates, weights and switches.

    Returns:
        lambda (K, L, r_init), detached; metrics (K,): mean loss, median, SD and range of lambda, and the share
        of the cross-entropy in the gradient of A and B at the last step.
    """
    net, params, sizes = ctx.net, ctx.params, ctx.sizes
    params.set(LAMBDA, start)
    share = torch.ones_like(sizes)
    ce_sum = torch.zeros_like(sizes)

    def loss(batch: LaneBatch) -> Tensor:
        k = batch.lanes
        raw = params[LAMBDA][:k]
        lam = clamp_lambda(raw)
        use_lambda(net, raw if cfg.forward == "raw" else lam)
        ce = lane_losses(net, batch)
        ce_sum[:k] += ce.detach() if batch.step_share is None else ce.detach() * batch.step_share.to(ce.dtype)
        penalty = cfg.alpha_s * sparsity(column_norms(net, params, k), lam) + cfg.alpha_p * hyper_prior(lam)
        return ce + penalty / sizes[:k]

    last = [cfg.epochs * math.ceil(lane.size / cfg.batch_size) - 1 for lane in ctx.lanes]

    def log_share(batch: LaneBatch, step: int) -> None:
        if step in last:
            running = [lane for lane in range(batch.lanes) if last[lane] == step]
            share[running] = _cross_entropy_share(ctx, cfg, batch.lanes)[running]

    how = Training(cfg.epochs, cfg.batch_size, "train", cfg.max_grad_norm)
    groups = [
        AdamGroup(lora_names(net), cfg.lr),
        AdamGroup((LAMBDA,), cfg.lambda_lr, zero_grad=not cfg.accumulate_lambda_grad),
    ]
    trace = train(ctx, groups, how, loss, log_share)
    if net.ranks is not None:
        net.ranks.sum_(ce_sum)
    for lane, steps in zip(ctx.lanes, trace.steps.tolist(), strict=True):
        if steps < FEW_STEPS:
            ctx.warn(lane, f"the rank search has only {steps} step(s) on {lane.size} examples: lambda hardly moves")
    lam = params[LAMBDA].detach().clone()
    if cfg.target == "clamped":
        lam = lam.clamp(LAMBDA_MIN, LAMBDA_MAX)
    flat = lam.flatten(1)
    return lam, {
        "train_loss": ce_sum / trace.steps,
        "lambda_median": flat.median(1).values,
        "lambda_sd": flat.std(1),
        "lambda_min": flat.amin(1),
        "lambda_max": flat.amax(1),
        "ce_gradient_share": share,
    }


@torch.no_grad()
def _cross_entropy_share(ctx: ClientContext, cfg: RankSearchConfig, k: int) -> Tensor:
    """|g_CE| / (|g_CE| + |g_s|) over A and B, where g_s = alpha_s / N * sign(B) / lambda is known in closed form."""
    lam = ctx.params[LAMBDA][:k].clamp(LAMBDA_MIN, LAMBDA_MAX)
    weight = (cfg.alpha_s / ctx.sizes[:k]).view(k, 1, 1)
    ce, penalty = lam.new_zeros(k), lam.new_zeros(k)
    for number, adapted in enumerate(ctx.net.adapted):
        a, b = ctx.params[f"lora_A.{adapted.name}"], ctx.params[f"lora_B.{adapted.name}"]
        assert a.grad is not None
        assert b.grad is not None
        prior = weight * b[:k].sign() / lam[:, number].unsqueeze(1)
        ce += (b.grad[:k] - prior).square().sum((1, 2)) + a.grad[:k].square().sum((1, 2))
        penalty += prior.square().sum((1, 2))
    ce, penalty = ce.sqrt(), penalty.sqrt()
    return ce / (ce + penalty).clamp_min(1e-30)
