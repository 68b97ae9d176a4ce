"""Loss of targets and its mean per lane, without all their logits at once where these are many.

The loss is cross-entropy, of texts or of response tokens, and of a model that knows which numbers are wanted of its
outputs (`LaneNet.wanted`) their squared error. Nobody but this file and who scores models needs to know which.

Above `WHOLE_LOGITS` a language model's targets are scored a piece at a time. The gradient at a target's hidden state is
that of its own loss alone, times what comes from above: under a frozen output embedding it is made together with the
loss, so that no logits outlive their piece and nothing is computed twice (as in Liger Kernel, Hsu et al., 2024). An
output embedding that is trained or adapted is computed again in the backward pass, piece by piece.

A second derivative needs logits that are still there: who takes one uses `whole_losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.checkpointing import replaying
from fedtailor.lanes.layers import KeptLinear
from fedtailor.lanes.net import LaneNet

WHOLE_LOGITS: Final = 2**26
"""Most logits of a pass that are there at once, 268 MB in float32. Up to here nothing is cut: part of the numbers
(to rounding), so no setting."""

PIECE_LOGITS: Final = 2**24
"""Logits of a piece on a CPU: larger ones leave the caches and are mapped anew. A GPU takes `WHOLE_LOGITS`."""


def lane_losses(net: LaneNet, batch: LaneBatch) -> Tensor:
    """Mean loss of each lane over its own targets, (k,), at most `WHOLE_LOGITS` logits at a time.

    It has no second derivative above that; `whole_losses` has.

    Args:
        net: scores.
        batch: texts, or instructions with their response tokens as targets.
    """
    return _means(target_losses(net, batch), batch)


def whole_losses(net: LaneNet, batch: LaneBatch) -> Tensor:
    """`lane_losses` that can be differentiated twice: with all logits at once, however many."""
    return _means(_each(net, net.logits(batch), batch), batch)


def lane_cross_entropy(logits: Tensor, batch: LaneBatch) -> Tensor:
    """Mean cross-entropy of each lane over its own targets: texts, or response tokens.

    Args:
        logits: (k, m, C).
        batch: labels and valid targets (k, m).

    Returns:
        (k,).
    """
    return _means(_cross_entropy(logits, batch.labels), batch)


def target_losses(net: LaneNet, batch: LaneBatch) -> Tensor:
    """Loss of each target, (k, m), those that only fill a lane up included; see `lane_losses`."""
    if batch.lanes > 1 and not net.state.fused:
        return torch.cat([_alone(net, batch, lane) for lane in range(batch.lanes)])
    if batch.positions is None:
        return _each(net, net.logits(batch), batch)
    head: Any = net.model.get_output_embeddings()  # type: ignore[operator]
    frozen = type(head) in (nn.Linear, KeptLinear) and not head.weight.requires_grad
    classes = getattr(head, "base", head).out_features
    # ZeRO gathers the weights of an adapted layer at every call, and ranks may have unequally many pieces.
    if batch.labels.numel() * classes <= WHOLE_LOGITS or (net.ranks is not None and not frozen):
        return _cross_entropy(net.logits(batch), batch.labels)
    hidden, m = net.at_targets(batch), batch.labels.shape[1]
    most = max(1, (WHOLE_LOGITS if hidden.is_cuda else PIECE_LOGITS) // (batch.lanes * classes))
    width = -(-m // -(-m // most))  # as many pieces as it takes, about equally wide
    if frozen:
        kind = net.compute_type or head.weight.dtype
        return _called(head, lambda x: _frozen_head(x, batch.labels, *_narrow(head, kind), width), hidden)
    pieces = zip(torch.split(hidden, width, 1), torch.split(batch.labels, width, 1), strict=True)
    how: dict[str, Any] = {"use_reentrant": False, "context_fn": replaying(net.state)}
    return torch.cat([checkpoint(lambda x, y: _cross_entropy(net.scores(x), y), *piece, **how) for piece in pieces], 1)


def _alone(net: LaneNet, batch: LaneBatch, lane: int) -> Tensor:
    with net.alone(lane):
        return target_losses(net, batch.lane(lane))


def _each(net: LaneNet, logits: Tensor, batch: LaneBatch) -> Tensor:
    """Cross-entropy of each target, or the squared error of a row's outputs, summed over them; (k, m)."""
    if net.wanted is None:
        return _cross_entropy(logits, batch.labels)
    errors: Tensor = logits - net.wanted(batch.input_ids[..., 0])
    return errors.square().sum(-1)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each target: logits (k, n, C), labels and result (k, n)."""
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)


def _means(each: Tensor, batch: LaneBatch) -> Tensor:
    weight = batch.valid.to(each.dtype)
    return (each * weight).sum(1) / weight.sum(1)


def _narrow(head: nn.Linear, kind: torch.dtype) -> tuple[Tensor, Tensor | None]:
    return head.narrow(kind) if isinstance(head, KeptLinear) else (head.weight.to(kind), head.bias)


def _called(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Calls a module with another forward pass: by its hooks ZeRO-3 gathers its weights, once for all pieces."""
    vars(module)["forward"] = forward
    try:
        found: Tensor = module(x)
    finally:
        del vars(module)["forward"]
    return found


def _frozen_head(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
    losses: Tensor = _FrozenHead.apply(hidden, labels, weight, bias, width)  # type: ignore[no-untyped-call]
    return losses


class _FrozenHead(torch.autograd.Function):
    """Cross-entropy (k, m) of hidden states (k, m, d) under a frozen linear layer, and its gradient there.

    Losses, and what is summed for them, are float32 (or the base's type if wider), products of the weight's type.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, width: int) -> Tensor:
        pieces = zip(torch.split(hidden, width, 1), torch.split(labels, width, 1), strict=True)
        parts = [_scored(x, y, weight, bias, ctx.needs_input_grad[0]) for x, y in pieces]
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat([slope for _, slope in parts], 1).to(hidden.dtype))
        return torch.cat([each for each, _ in parts], 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        if torch.is_grad_enabled():  # by create_graph=True
            raise RuntimeError("logits in pieces have no second derivative; take whole_losses")
        (slopes,) = ctx.saved_tensors
        return (slopes * gradients[0].unsqueeze(-1)).to(slopes.dtype), None, None, None, None


def _scored(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, slopes: bool) -> tuple[Tensor, Tensor]:
    """Losses (k, n) of a piece and, if asked for, their gradients at its hidden states (k, n, d)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    bias = None if bias is None else bias.to(weight.dtype)
    logs = functional.linear(hidden.to(weight.dtype), weight, bias).log_softmax(-1, dtype=wide)
    own = labels.unsqueeze(-1)
    each = -logs.gather(-1, own).squeeze(-1)
    if not slopes:
        return each, hidden
    # Softmax minus one at the label, in place.
    logs.exp_().scatter_add_(-1, own, -torch.ones_like(own, dtype=wide))
    return each, logs.to(weight.dtype) @ weight
