"""What the server may lay around any method: robust aggregation and privacy. The method itself does not know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedtailor.aggregation.krum import Krum
from fedtailor.aggregation.median import CoordinateMedian
from fedtailor.aggregation.trimmed_mean import TrimmedMean
from fedtailor.core.config import Config
from fedtailor.core.method import Aggregator, Method
from fedtailor.core.settings import AggregationConfig
from fedtailor.methods import build_method


def guarded(name: str, config: Mapping[str, Any] | Config, r_max: int, guards: Mapping[str, Any]) -> Method:
    """Builds a row of the METHODS table with its guards around it.

    Args:
        name: row of METHODS.
        config: that method's resolved configuration.
        r_max: largest budget.
        guards: sections ``aggregation`` and ``privacy`` of the configuration, those that differ from their defaults.
    """
    method = build_method(name, config, r_max)
    return robust(method, AggregationConfig.model_validate(dict(guards.get("aggregation", {}))))


def robust(method: Method, cfg: AggregationConfig) -> Method:
    """The method with the aggregation asked for; norms are watched either way."""
    watched = replace(method, alarm=cfg.alarm)
    if cfg.name == "norm_bound":
        assert cfg.bound is not None, "the configuration asks for it"
        return replace(watched, bound=cfg.bound)
    return watched if cfg.name == "method" else replace(watched, aggregator=_aggregator(cfg))


def _aggregator(cfg: AggregationConfig) -> Aggregator:
    if cfg.name == "median":
        return CoordinateMedian()
    if cfg.name == "trimmed_mean":
        return TrimmedMean(cfg.trim)
    return Krum(cfg.byzantine, cfg.kept)
