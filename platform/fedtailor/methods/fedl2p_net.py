"""LRNet: a client's features to one learning rate per weight matrix (FedL2P; sizes from FedP2EFT A.4)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedtailor.core.config import Config
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.seeding import torch_rng
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.training.bayestune import clamp_through

MULTIPLIERS = "multipliers"


class LrNetConfig(Config):
    """The net that says the rates, and the outer optimizer."""

    when_absent: ClassVar[Mapping[str, Any]] = {"features_eps": 0.0}
    lr: Rate = 1e-4
    """Adam, LRNet (A.4; grid 1e-5 ... 1e-3)."""
    multiplier_lr: Rate = 1e-6
    """Adam, multipliers (A.4; grid 1e-4 ... 1e-6). They start at `finetune.lr`."""
    hidden: Positive = 100
    gain: Rate = 0.1
    bias: float = 1.0
    max_output: Rate = 1000.0
    clip: Literal["value", "norm"] = "value"
    """Hypergradient: every element to [-clip_at, clip_at] (paper), or LRNet's and the multipliers' norm to it."""
    clip_at: Rate = 1.0
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rounds phi after every step, as the reference does."""
    features_pad_to: Positive | None = None
    """None: real tokens only. A length: padding up to it counts too, as in the reference, which has the task's."""
    features_eps: Annotated[float, Field(ge=0)] = 0.0
    """SD(h) = sqrt(variance + features_eps); the reference adds 1e-5."""


@dataclass(frozen=True)
class RateNet:
    """(2L,) features -> Linear -> ReLU -> Linear -> ReLU -> Linear -> 2L factors, times 2L multipliers; per lane.

    Args:
        cfg: sizes and start.
        lr: where the multipliers start.
    """

    cfg: LrNetConfig
    lr: float

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Three linear layers, then the multipliers, all SHARED."""
        width, h = 2 * len(net.adapted), self.cfg.hidden
        shapes = {
            "lrnet.first.weight": (h, width),
            "lrnet.first.bias": (h,),
            "lrnet.second.weight": (h, h),
            "lrnet.second.bias": (h,),
            "lrnet.out.weight": (width, h),
            "lrnet.out.bias": (width,),
            MULTIPLIERS: (width,),
        }
        return [ParamSpec(name, shape, Scope.SHARED) for name, shape in shapes.items()]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """Small weights and biases of 1, so that every rate starts near ``lr``."""
        values = {}
        for spec in self.specs(net):
            if len(spec.shape) == 2:
                sd = self.cfg.gain * math.sqrt(2 / sum(spec.shape))
                values[spec.name] = torch.randn(spec.shape, generator=torch_rng(seed, spec.name)) * sd
            else:
                start = self.lr if spec.name == MULTIPLIERS else self.cfg.bias
                values[spec.name] = torch.full(spec.shape, start, dtype=torch.float64)
        return values

    def features(self, ctx: ClientContext) -> Tensor:
        """Its input, (K, 2L)."""
        return ctx.client_features(self.cfg.features_pad_to, eps=self.cfg.features_eps)

    def __call__(self, params: LaneParams, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features (K, 2L) to rates (K, 2L), A then B of each layer, and LRNet's outputs before the clamp."""
        x = features.unsqueeze(2)
        for layer in ("first", "second", "out"):
            bias, weight = params[f"lrnet.{layer}.bias"].unsqueeze(2), params[f"lrnet.{layer}.weight"]
            x = torch.baddbmm(bias, weight, x if layer == "first" else x.relu())
        raw = x.squeeze(2)
        factors = clamp_through(raw, 0.0, self.cfg.max_output)
        return clamp_through(params[MULTIPLIERS], 0.0, None) * factors, raw

    def measure(self, rates: Tensor, raw: Tensor) -> dict[str, Tensor]:
        """Mean and SD of the rates, share of frozen matrices (rate 0) and of clamped outputs, (K,) each."""
        outside = (raw < 0) | (raw > self.cfg.max_output)
        return {
            "rate_mean": rates.mean(1),
            "rate_sd": rates.std(1),
            "rate_zero_share": (rates == 0).to(rates.dtype).mean(1),
            "rate_clamped_share": outside.to(rates.dtype).mean(1),
        }
