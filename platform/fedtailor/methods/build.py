"""What the server may lay around any method: robust aggregation and privacy. The method itself does not know."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedtailor.aggregation.robust import CoordinateMedian, Krum, TrimmedMean
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.errors import ConfigError
from fedtailor.core.settings import AggregationConfig
from fedtailor.federated.method import Aggregator, Method
from fedtailor.methods import build_method
from fedtailor.privacy.central_dp import GaussianMechanism
from fedtailor.privacy.config import PrivacyConfig
from fedtailor.privacy.secure_aggregation import PairwiseMasking, RingSum


def build_server_side(
    name: str, config: Mapping[str, Any] | Config, r_max: int, server_side: Mapping[str, Any]
) -> Method:
    """Builds a row of the METHODS table with what the server lays around it.

    Args:
        name: row of METHODS.
        config: that method's resolved configuration.
        r_max: largest budget.
        server_side: sections ``aggregation`` and ``privacy``, where they differ from their defaults.
    """
    method = build_method(name, config, r_max)
    method = with_aggregation(method, AggregationConfig.model_validate(dict(server_side.get("aggregation", {}))))
    privacy = PrivacyConfig.model_validate(dict(server_side.get("privacy", {})))
    return with_secure_aggregation(with_central_dp(method, privacy), privacy)


def with_aggregation(method: Method, cfg: AggregationConfig) -> Method:
    """The method with the aggregation asked for; norms are watched either way."""
    watched = replace(method, norm_alarm=cfg.alarm)
    if cfg.name == "norm_bound":
        assert cfg.bound is not None, "the configuration asks for it"
        return replace(watched, bound=cfg.bound)
    return watched if cfg.name == "method" else replace(watched, aggregator=_aggregator(cfg))


def with_central_dp(method: Method, cfg: PrivacyConfig) -> Method:
    """The method under central differential privacy: clipped updates, equal weights, noise on their sum."""
    if cfg.name == "none" or method.local_update is None:
        return method
    if cfg.noise_multiplier is None:
        raise ConfigError("'privacy.target_epsilon' was not resolved to a noise multiplier")
    clip = math.inf if cfg.clip is None else cfg.clip
    mechanism = GaussianMechanism(clip, cfg.noise_multiplier)
    return replace(method, aggregator=WeightedMean(uniform=True), bound=clip, mechanism=mechanism)


def with_secure_aggregation(method: Method, cfg: PrivacyConfig) -> Method:
    """The method under simulated secure aggregation; the server sees no single norm, so none is watched."""
    if cfg.secure_aggregation == "none" or method.local_update is None:
        return method
    mean = method.aggregator
    if not isinstance(mean, WeightedMean):
        raise ConfigError(f"method {method.name} does not use a mean: secure aggregation can only add")
    ring = RingSum(bits=cfg.secagg.modulus_bits)
    return replace(method, aggregator=ring, masking=PairwiseMasking(cfg, mean.uniform), norm_alarm=0.0)


def _aggregator(cfg: AggregationConfig) -> Aggregator:
    if cfg.name == "median":
        return CoordinateMedian()
    if cfg.name == "trimmed_mean":
        return TrimmedMean(cfg.trim)
    return Krum(cfg.byzantine, cfg.kept)
