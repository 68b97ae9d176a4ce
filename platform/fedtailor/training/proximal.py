"""The pull towards fixed values while a client trains: mu/2 |w - a|^2 beside the task's loss, lane by lane.

Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020, Eq. 2: a are the parameters as received. In
Ditto (Li et al., ICML 2021) it is the personal model that is pulled to them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.params import LaneParams


class ProximalTerm:
    r"""Adds :math:`\mu (w - a)`, the term's gradient, to that of the task's loss.

    An instance is an ``after_backward`` of `training.local.train`: once per step, however many micro-batches
    and ranks share it, before clipping. The loss that `train` reports stays the task's own, comparable over mu.

    Args:
        params: the lanes' parameters w.
        anchor: name to a, (K, *shape); parameters that are not named are free.
        mu: weight of the term, at least 0. At 0 training is the same to the last bit as without the term.
    """

    def __init__(self, params: LaneParams, anchor: Mapping[str, Tensor], mu: float) -> None:
        self._pairs = [(params[name], a) for name, a in anchor.items()]
        self._mu = mu

    @torch.no_grad()
    def __call__(self, batch: LaneBatch, step: int) -> None:
        """Adds the gradient for the lanes that run, always the first ones."""
        k = batch.lanes
        for w, a in self._pairs:
            assert w.grad is not None
            w.grad[:k].add_(w[:k] - a[:k], alpha=self._mu)

    @torch.no_grad()
    def distance(self) -> Tensor:
        """|w - a| of every lane over all named parameters, (K,)."""
        return torch.stack([(w - a).square().flatten(1).sum(1) for w, a in self._pairs]).sum(0).sqrt()
