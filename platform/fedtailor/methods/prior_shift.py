"""A common model whose logits are shifted by the client's label prior: what label skew alone gives on top of reading.

After Saerens, Latinne, Decaestecker, "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural
Computation 2002, Eq. 2.4: log p_k(y | x) = f(x)_y + log p_k(y) - log p(y) + const, with f the common model's logits,
p_k the class shares of the client's training texts and p those of all seen clients' together.
    f  -> cfg.model: the base (nothing is trained), or HOMLoRA, trained in rounds of its own as the section homlora says
Both shares are smoothed, (n_y + a) / (n + a C) with a = cfg.smoothing. Where the shares are equal the common model
answers. A personalised method that does not beat this row has learned how often its client's labels occur.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.settings import Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Capability, Method, MethodEntry, Personalised, Personaliser
from fedtailor.lanes.batches import LaneBatch
from fedtailor.methods.homlora import HomLoraConfig
from fedtailor.methods.homlora import build as build_homlora
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import NoPersonalisation


class PriorShiftConfig(Config):
    """Whose logits are shifted, and how counts become shares."""

    model: Literal["base", "homlora"] = "base"
    """Whose logits are shifted."""
    homlora: HomLoraConfig | None = None
    """With model=homlora, how it is trained; None: as the section ``homlora`` says."""
    smoothing: Rate = 1.0
    """a: texts of each class that are added to those that there are."""

    def beside(self, tree: Any) -> Self:
        """With the section of HOMLoRA, where it is needed and not given."""
        if self.model == "base" or self.homlora is not None:
            return self
        return self.model_copy(update={"homlora": tree.homlora})


@dataclass(frozen=True)
class PriorShift:
    """Shifts another personaliser's logits."""

    cfg: PriorShiftConfig
    common: Personaliser
    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """The common model with log p_k(y) - log p(y) added to its logits."""
        made = self.common(ctx)
        labels = (torch.from_numpy(lane.train.labels) for lane in ctx.lanes)
        own = torch.stack([torch.bincount(y, minlength=ctx.num_labels) for y in labels])
        every = torch.tensor(ctx.federation.class_counts)
        shift = (log_shares(own, self.cfg.smoothing) - log_shares(every, self.cfg.smoothing)).to(ctx.sizes)

        def logits(batch: LaneBatch) -> Tensor:
            found = made.logits(batch)
            return found + shift[: len(found)].unsqueeze(1).to(found.dtype)

        return replace(made, logits=logits, spectra={}, export=None)


def log_shares(counts: Tensor, smoothing: float) -> Tensor:
    """Logarithms of smoothed class shares, of counts (..., C), float64.

    >>> log_shares(torch.tensor([3, 1]), 1.0).exp()
    tensor([0.6667, 0.3333], dtype=torch.float64)
    """
    smoothed = counts.double() + smoothing
    return (smoothed / smoothed.sum(-1, keepdim=True)).log()


def build(cfg: PriorShiftConfig, r_max: int) -> Method:
    """A client-only method on the base, or one with HOMLoRA's rounds."""
    needs = frozenset({Capability.CLASSES})
    if cfg.model == "base":
        shift = PriorShift(cfg, NoPersonalisation())
        return Method("prior_shift", shift, WeightedMean(), ServerSgd(), requires=needs, adapter_is_model=False)
    common = build_homlora(cfg.homlora or HomLoraConfig(), r_max)
    shift = PriorShift(cfg, common.personaliser)
    return replace(common, name="prior_shift", personaliser=shift, requires=needs, adapter_is_model=False)


def note(cfg: PriorShiftConfig) -> str:
    """Whose logits, and how the shares are smoothed."""
    whose, added = "the base's" if cfg.model == "base" else "HOMLoRA's", f"{cfg.smoothing:g}"
    return f"Prior shift adds log p_k(y) - log p(y) to {whose} logits; {added} is added to every count of a class."


ENTRY = MethodEntry(
    name="prior_shift",
    config=PriorShiftConfig,
    build=build,
    title="Prior shift",
    summary="a common model's logits plus the client's log label prior (Saerens et al. 2002)",
    colour="#c3a26b",
    marker="+",
    tiny={},
    note=note,
)
