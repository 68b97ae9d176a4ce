r"""Products with second derivatives of the training loss, lane by lane.

With F the loss of a batch, u and w two groups of a client's parameters (or one and the same), v like u:

.. math::
    \frac{\partial}{\partial w} \langle \nabla_u F, v \rangle

is what a bilevel step (PF2LoRA: w common, u the client's own) and a meta-learning step (Per-FedAvg: w = u) need.
`product` differentiates twice, which asks for attention kernels with a second derivative and for all logits at once.
`difference` takes two gradients at :math:`u \pm \epsilon v` (Pearlmutter, 1994; DARTS, Liu et al., 2019), which any
kernel, logits in pieces and a partitioned base allow. Losses of lanes are summed: each lane has its own derivatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtailor.core.errors import MethodError
from fedtailor.federated.checks import check_loss
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.loss import whole_losses
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.parts import step_parts
from fedtailor.training.local import backward, cross_entropy_of

Tensors = Sequence[Tensor]
_TWICE = ("eager", "sdpa")
"""Attention of transformers that can be differentiated twice, sdpa by its math kernel."""


@contextmanager
def twice_differentiable(net: LaneNet) -> Iterator[None]:
    """Attention by a kernel that has a second derivative, for what runs inside; fused kernels have none.

    Raises:
        MethodError: the model's attention has no such kernel.
    """
    kernel = getattr(net.config, "_attn_implementation", None) or "eager"
    if kernel not in _TWICE:
        raise MethodError(
            f"attention by '{kernel}' has no second derivative; use model.attention=sdpa or eager, or the method's "
            "first-order form"
        )
    with sdpa_kernel(SDPBackend.MATH):
        yield


def gradient(ctx: ClientContext, batch: LaneBatch) -> Tensor:
    """Fills ``ctx.params``' gradients with those of the batch's loss, and nothing else; the losses, (k,)."""
    ctx.params.zero_gradients()
    return backward(ctx, batch, cross_entropy_of(ctx))


def gradients(ctx: ClientContext, names: Sequence[str]) -> list[Tensor]:
    """Copies of the gradients that are there, (K, *shape)."""
    found = [ctx.params[name].grad for name in names]
    return [grad.clone() for grad in found if grad is not None]


def slopes(ctx: ClientContext, batch: LaneBatch, by: Tensors) -> tuple[list[list[Tensor]], Tensor]:
    """Gradients that can be differentiated again: by ``by``, of each part of the step; and the batch's losses, (k,).

    The graphs of all parts are alive until the result is gone.
    """
    parts, total = [], torch.zeros(batch.lanes, dtype=torch.float64, device=ctx.net.device)
    with twice_differentiable(ctx.net):
        for part in step_parts(ctx.net, batch, ctx.micro_batch):
            values = _losses(ctx, part)
            total += values.detach()
            parts.append(list(torch.autograd.grad(values.sum(), by, create_graph=True, materialize_grads=True)))
    return parts, total


def product(ctx: ClientContext, batch: LaneBatch, of: Tensors, by: Tensors, v: Tensors) -> list[Tensor]:
    r"""d/d by :math:`\langle \nabla_{of} F, v \rangle`, exactly, by differentiating twice.

    Args:
        ctx: lanes, adapters bound.
        batch: F is its loss.
        of: leaves u, (K, \*shape) each.
        by: leaves w.
        v: one tensor like each of ``of``.

    Returns:
        One tensor like each of ``by``, zero in lanes that do not run.

    Raises:
        MethodError: see `twice_differentiable`.
    """
    total = [torch.zeros_like(t) for t in by]
    with twice_differentiable(ctx.net):
        for part in step_parts(ctx.net, batch, ctx.micro_batch):
            slope = torch.autograd.grad(_losses(ctx, part).sum(), of, create_graph=True, materialize_grads=True)
            for t, found in zip(total, again(slope, by, v), strict=True):
                t += found
    return total


def again(slope: Tensors, by: Tensors, v: Tensors, retain: bool = False) -> list[Tensor]:
    """Differentiates <slope, v> by ``by``; zero where it does not depend on it."""
    pairs = [(s, t) for s, t in zip(slope, v, strict=True) if s.requires_grad]
    if not pairs:
        return [torch.zeros_like(t) for t in by]
    outputs, weights = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, by, weights, retain_graph=retain, materialize_grads=True))


def difference(
    ctx: ClientContext, batch: LaneBatch, of: Sequence[str], by: Sequence[str], v: Tensors, step: float
) -> list[Tensor]:
    r"""d/d by :math:`\langle \nabla_{of} F, v \rangle` by a central difference, to the second order in the step.

    Each lane moves by :math:`\epsilon = step / |v|`, as in DARTS. Overwrites the gradients in ``ctx.params``.

    Args:
        ctx: lanes, adapters bound.
        batch: F is its loss.
        of: parameters u; moved and put back.
        by: parameters w.
        v: one tensor (K, \*shape) like each of ``of``.
        step: length of the step.
    """
    length = torch.stack([t.flatten(1).square().sum(1) for t in v]).sum(0).sqrt()
    epsilon = torch.where(length > 0, step / length, torch.ones_like(length))
    before = [ctx.params[name].detach().clone() for name in of]
    masks, ends = dropout_state(ctx), []
    for sign in (1.0, -1.0):
        restore_dropout(ctx, masks)
        for name, start, t in zip(of, before, v, strict=True):
            ctx.params.set(name, start + sign * _per_lane(epsilon, t) * t)
        gradient(ctx, batch)
        ends.append(gradients(ctx, by))
    for name, start in zip(of, before, strict=True):
        ctx.params.set(name, start)
    return [(plus - minus) / (2 * _per_lane(epsilon, plus)) for plus, minus in zip(*ends, strict=True)]


def dropout_state(ctx: ClientContext) -> list[Tensor]:
    """Where the streams of dropout masks are: what is put back draws the same masks again."""
    return [generator.get_state() for generator in _generators(ctx)]


def restore_dropout(ctx: ClientContext, state: Sequence[Tensor]) -> None:
    """Back to a `dropout_state`."""
    for generator, position in zip(_generators(ctx), state, strict=True):
        generator.set_state(position)


def _generators(ctx: ClientContext) -> list[torch.Generator]:
    """Each lane's own; with dropout in the frozen base torch's, too."""
    at = ctx.net.device
    base = torch.cuda.default_generators[at.index or 0] if at.type == "cuda" else torch.default_generator
    return [*ctx.net.state.generators, *([base] if ctx.net.base_dropout else [])]


def _losses(ctx: ClientContext, part: LaneBatch) -> Tensor:
    values = check_loss(whole_losses(ctx.net, part), part.lanes)
    return values if part.step_share is None else values * part.step_share.to(values.dtype)


def _per_lane(values: Tensor, like: Tensor) -> Tensor:
    """(K,) beside (K, *shape)."""
    return values.view(-1, *[1] * (like.dim() - 1))
