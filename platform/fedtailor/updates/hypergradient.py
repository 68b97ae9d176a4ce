r"""How the validation loss after training depends on the learning rates that the training used.

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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedtailor.core.batches import LaneBatch
from fedtailor.core.config import Config
from fedtailor.core.settings import Natural, Positive, Rate
from fedtailor.tasks.classification import lane_cross_entropy

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
    logits: Callable[[LaneBatch], Tensor],
    params: Tensors,
    train: LaneBatch,
    validation: LaneBatch,
    cfg: HypergradientConfig,
) -> list[Tensor]:
    r"""What is multiplied with :math:`\partial w_T / \partial \phi`: v, or -H v in the implicit form.

    Every lane is one pair (clients and pairs alike): lane losses are summed, so each lane has its own g and H.

    Args:
        logits: class scores (k, b, C) of a batch over all lanes of ``params``.
        params: leaf tensors (k, \*shape) at w_T.
        train: gives H.
        validation: gives g.
        cfg: Q, psi and switches.

    Returns:
        One tensor like each of ``params``.
    """
    share = 1 / cfg.pairs if cfg.share_losses else 1.0
    if not cfg.terms and cfg.form == "lookahead":
        gradient = torch.autograd.grad(lane_cross_entropy(logits(validation), validation).sum(), params)
        return [cfg.psi * g for g in gradient] if cfg.times_psi else list(gradient)
    # Fused attention kernels have no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        gradient = torch.autograd.grad(lane_cross_entropy(logits(validation), validation).sum(), params)
        loss = share * lane_cross_entropy(logits(train), train).sum()
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
