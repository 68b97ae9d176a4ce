r"""FedL2P's hypergradient: how the validation loss after training depends on the learning rates of the training.

Sources: FedL2P (Lee et al., NeurIPS 2023); implicit differentiation with a truncated Neumann series: Lorraine et
al., "Optimizing Millions of Hyperparameters by Implicit Differentiation", AISTATS 2020, Algorithms 2 and 3.

Learning rates do not occur in the training loss, so the mixed derivative of the implicit function theorem is zero
for them. Their one trace in the trained weights is the updates, and FedL2P keeps the last one:

.. math::
    w_T(\phi) = w_{T-1} - \eta(\phi) \circ u,

with Adam's direction u and :math:`w_{T-1}` held constant, and one rate :math:`\eta_j` for each weight matrix j.

**Lookahead** (default). With g the gradient of the validation loss at :math:`w_T`, H the Hessian of the training
loss there and

.. math::
    v = \sum_{q=0}^{Q} (I - \psi H)^q g,
    \qquad \frac{dL_{val}}{d\eta_j} = -\langle v_j, u_j \rangle,

Q = 0 is the exact derivative of :math:`L_{val}(w_T(\phi))`. For Q > 0 it is the exact derivative through the last
Q + 1 updates, where each is :math:`w \leftarrow w - \psi \nabla L_{train}(w) - \eta \circ u` and the loss is
quadratic: truncated back-propagation, in which an earlier update counts as far as the later ones let it survive.

**Implicit** (the public code). It puts the same v into the implicit function theorem and lets automatic
differentiation find the "mixed derivative" through :math:`w_T(\phi)`, which gives

.. math::
    -v^\top H \, \frac{\partial w_T}{\partial \phi}
      = -\frac{1}{\psi} g^\top \left(I - (I - \psi H)^{Q+1}\right) \frac{\partial w_T}{\partial \phi}.

In every direction where the loss curves upwards (0 < psi h < 1) its sign is opposite to the lookahead's: it
lowers a rate where a longer last step would have lowered the validation loss, and raises it where that would have
done harm.

The outer batch is pairs of one training and one validation text, many in one pass. H needs all their logits at once:
its second backward pass goes through them again, and what `lanes.loss` makes a piece at a time is gone by then. At
first order there is no H, and no such need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtailor.adapters.lora import LoraAdapter, lora_names
from fedtailor.core.config import Config
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import Natural, Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import Examples, IntArray, LaneBatch, make_batch
from fedtailor.lanes.loss import lane_losses, whole_losses
from fedtailor.lanes.params import LaneParams

Tensors = Sequence[Tensor]
HessianProduct = Callable[[Tensors], list[Tensor]]


class HypergradientConfig(Config):
    """Defaults: FedP2EFT A.4 (FedL2P)."""

    terms: Natural = 3
    """Q, terms of the Neumann series after the first; 0 is the plain one-step lookahead, which needs no second
    derivative: the first-order option where that does not fit (ZeRO, fused attention)."""
    psi: Rate = 0.1
    """Step of the Neumann series."""
    pairs: Positive = 16
    """Outer batch: pairs of one training and one validation text; each pair has a Hessian of its own."""
    at_once: Positive = 16
    """Pairs of a client in one pass: less memory if smaller, the same result up to rounding."""
    form: Literal["lookahead", "implicit"] = "lookahead"
    """``implicit`` is the public code's product with H, of the opposite sign."""
    times_psi: bool = False
    """Multiply the series by psi, as Lorraine et al. do: psi * v tends to the inverse Hessian times g."""
    share_losses: bool = False
    """H of a pair's loss divided by the number of pairs, as in the public code: psi is that much smaller."""

    @property
    def first_order(self) -> bool:
        """There is no H."""
        return not self.terms and self.form == "lookahead"


def neumann(gradient: Tensors, product: HessianProduct, terms: int, psi: float) -> list[Tensor]:
    r""":math:`\sum_{q=0}^{terms} (I - \psi H)^q g`.

    psi times the result tends to :math:`H^{-1} g` if all eigenvalues of psi H lie in (0, 2).

    Args:
        gradient: g, one tensor per parameter.
        product: H times a vector of the same layout.
        terms: Q; 0 returns g.
        psi: step.
    """
    total, term = list(gradient), list(gradient)
    for _ in range(terms):
        term = [t - psi * h for t, h in zip(term, product(term), strict=True)]
        total = [a + t for a, t in zip(total, term, strict=True)]
    return total


def hessian_product(slope: Tensors, params: Tensors) -> HessianProduct:
    """H times a vector, by a second backward pass.

    Args:
        slope: gradient of the loss with respect to ``params``, made with ``create_graph=True``.
        params: what was differentiated by.
    """

    def product(vector: Tensors) -> list[Tensor]:
        return list(torch.autograd.grad(slope, params, grad_outputs=vector, retain_graph=True))

    return product


def cotangent(
    losses: Callable[[LaneBatch], Tensor],
    params: Tensors,
    train: LaneBatch,
    validation: LaneBatch,
    cfg: HypergradientConfig,
) -> list[Tensor]:
    r"""What is multiplied with :math:`\partial w_T / \partial \phi`: v, or -H v in the implicit form.

    Every lane is one pair (clients and pairs alike): lane losses are summed, so each lane has its own g and H.

    Args:
        losses: mean cross-entropies (k,) of a batch over all lanes of ``params``; twice differentiable but at first
            order.
        params: leaf tensors (k, \*shape) at w_T.
        train: gives H.
        validation: gives g.
        cfg: Q, psi and switches.

    Returns:
        One tensor like each of ``params``.
    """
    share = 1 / cfg.pairs if cfg.share_losses else 1.0
    if cfg.first_order:
        gradient = torch.autograd.grad(losses(validation).sum(), params)
        return [cfg.psi * g for g in gradient] if cfg.times_psi else list(gradient)
    # Fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(losses(validation).sum(), params)
        loss = share * losses(train).sum()
        product = hessian_product(torch.autograd.grad(loss, params, create_graph=True), params)
        v = neumann(gradient, product, cfg.terms, cfg.psi)
        if cfg.form == "implicit":
            v = [-h for h in product(v)]
    return [cfg.psi * t for t in v] if cfg.times_psi else v


def rate_derivative(v: Tensors, direction: Tensors) -> Tensor:
    r"""Derivative with respect to the rates, :math:`-\langle v_j, u_j \rangle`, lane by lane.

    Args:
        v: cotangents, (K, \*shape) each.
        direction: u of the last update, in the same order.

    Returns:
        (K, number of tensors).
    """
    return torch.stack([-(a * u).flatten(1).sum(1) for a, u in zip(v, direction, strict=True)], dim=1)


def cycled(size: int, count: int, rng: np.random.Generator) -> IntArray:
    """``count`` row numbers below ``size``: pass after pass over all rows, each in another order."""
    passes = [rng.permutation(size) for _ in range(math.ceil(count / size))]
    return np.concatenate(passes)[:count]


@dataclass(frozen=True)
class OuterPairs:
    """The pairs of every lane and outer step.

    Args:
        ctx: lanes with their training texts, LoRA in ``ctx.params``.
        validation: texts held out, by lane.
        train_rows: rows of training texts, (K, steps, pairs).
        validation_rows: rows of validation texts, (K, steps, pairs).
    """

    ctx: ClientContext
    validation: Sequence[Examples]
    train_rows: IntArray
    validation_rows: IntArray

    @classmethod
    def draw(cls, ctx: ClientContext, validation: Sequence[Examples], steps: int, pairs: int) -> OuterPairs:
        """Named by (seed, stage, round, client): no text is drawn again before all of its side were drawn."""
        drawn = []
        for side, sizes in (
            ("train", [lane.size for lane in ctx.lanes]),
            ("validation", [len(v.labels) for v in validation]),
        ):
            rows = [
                cycled(size, steps * pairs, numpy_rng(ctx.seed, ctx.stage, ctx.round, lane.client.id, f"pairs/{side}"))
                for lane, size in zip(ctx.lanes, sizes, strict=True)
            ]
            drawn.append(np.stack(rows).reshape(len(rows), steps, pairs))
        return cls(ctx, validation, drawn[0], drawn[1])

    def cotangents(self, adapter: LoraAdapter, step: int, cfg: HypergradientConfig) -> list[Tensor]:
        """Means over a step's pairs of `hypergradient.cotangent` at the weights in ``ctx.params``.

        Args:
            adapter: binds A and B; bound to ``ctx.params`` again afterwards.
            step: outer step.
            cfg: Q, psi and switches.

        Returns:
            One tensor (K, *shape) for A and B of each layer in turn.
        """
        net, lanes = self.ctx.net, len(self.ctx.lanes)
        names = lora_names(net)
        losses = partial(lane_losses if cfg.first_order else whole_losses, net)
        sums: list[Tensor] = []
        for start in range(0, cfg.pairs, cfg.at_once):
            chosen = slice(start, min(start + cfg.at_once, cfg.pairs))
            each = chosen.stop - start
            wide = self._copies(adapter, each)
            train = self._batch([lane.train for lane in self.ctx.lanes], self.train_rows[:, step, chosen])
            validation = self._batch(self.validation, self.validation_rows[:, step, chosen])
            found = cotangent(losses, [wide[name] for name in names], train, validation, cfg)
            parts = [t.view(lanes, each, *t.shape[1:]).sum(1) for t in found]
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else parts
        adapter.bind(net, self.ctx.params)
        net.place([lane.client.id for lane in self.ctx.lanes])
        return [total / cfg.pairs for total in sums]

    def _batch(self, examples: Sequence[Examples], rows: IntArray) -> LaneBatch:
        """Every pair is a lane of its own with one text; rows (K, each)."""
        for lane, texts, chosen in zip(self.ctx.lanes, examples, rows, strict=True):
            self.ctx.trained[lane.client.id] += int(texts.lengths[chosen].sum())
        repeated = [e for e in examples for _ in range(rows.shape[1])]
        return make_batch(repeated, list(rows.reshape(-1, 1)), self.ctx.pad_id, self.ctx.net.device)

    @torch.no_grad()
    def _copies(self, adapter: LoraAdapter, each: int) -> LaneParams:
        """A and B of every client ``each`` times, as leaves, bound to the model."""
        net, own = self.ctx.net, self.ctx.params
        wide = LaneParams(adapter.specs(net), each * own.lanes, net.device, net.param_dtype, trained=False)
        for name in lora_names(net):
            wide.set(name, own[name].repeat_interleave(each, 0))
            wide[name].requires_grad_()
        adapter.bind(net, wide)
        net.place([lane.client.id for lane in self.ctx.lanes for _ in range(each)])
        return wide
