"""Each client's most frequent training class: what label skew alone gives away.

Under Dirichlet(0.5) label skew a client can be right often without reading; no method is worth its tables that
does not beat this one. Ties go to the class of the lower number. Scores are log frequencies with add-one smoothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method, MethodEntry, Personalised
from fedtailor.lanes.batches import LaneBatch
from fedtailor.server_optim.sgd import ServerSgd


class MajorityConfig(Config):
    """Nothing to set."""


@dataclass(frozen=True)
class MajorityClass:
    """Answers with the client's own class frequencies."""

    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Counts the training labels."""
        counts = torch.stack(
            [torch.bincount(torch.from_numpy(lane.train.labels), minlength=ctx.num_labels) for lane in ctx.lanes]
        )
        scores = ((counts + 1) / (counts + 1).sum(1, keepdim=True)).log().to(ctx.sizes)

        def logits(batch: LaneBatch) -> Tensor:
            k, b = batch.labels.shape
            return scores[:k].unsqueeze(1).expand(k, b, ctx.num_labels)

        return Personalised(ctx.lanes, logits)


def build(cfg: MajorityConfig, r_max: int) -> Method:
    """A client-only method without a model."""
    needs = frozenset({Capability.CLASSES})
    return Method("majority", MajorityClass(), WeightedMean(), ServerSgd(), requires=needs)


ENTRY = MethodEntry(
    name="majority",
    config=MajorityConfig,
    build=build,
    title="Majority",
    summary="each client's most frequent training class",
    colour="#9aa0a8",
    marker="x",
    tiny={},
)
