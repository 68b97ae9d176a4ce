"""Mixed start by a grid: every round begins at the best of a few mixes of own and common LoRA, one weight for all.

The cheap rival of `pfedgpt` (Shen et al., EMNLP 2025): w = 0 is FedAvg, w = 1 local training after the first round.
    theta_global -> SHARED    "global_*"
    theta_local  -> PRIVATE   "local_*", "slow_start.*"
Ours: not a published method. All of V decides, since there are as few mixes as finalists of HBO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field

from fedtailor.federated.method import Method, MethodEntry
from fedtailor.methods.pfedgpt import TINY
from fedtailor.training.mix_trials import Choice, Trials, by_group
from fedtailor.training.mixed_start import MixConfig, mixed_method
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import DesignSearch
from fedtailor.training.validation_rows import ScoredOn


class MixGridConfig(MixConfig):
    """Frame and rates are pFedGPT's."""

    weights: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = (0, 0.25, 0.5, 0.75, 1)
    """w, shares of the client's own LoRA; one alone is a fixed mix."""


@dataclass(frozen=True)
class GridSearch:
    """The best weight of a list."""

    cfg: MixGridConfig

    def __call__(self, mixtures: Mixtures, lanes: Sequence[int], rows: Sequence[ScoredOn]) -> Choice:
        """Scores every weight on all of V."""
        trials, texts = Trials(mixtures, lanes), [each.high for each in rows]
        spread = [by_group(np.zeros(len(mixtures.layers), np.int64))] * len(lanes)
        searches = [DesignSearch(np.array(self.cfg.weights, np.float64).reshape(-1, 1)) for _ in lanes]
        count = len(self.cfg.weights)
        trials.run(searches, spread, texts, count, count)
        return trials.best([own.known for own in searches], spread, texts, [np.zeros((1, 1))] * len(lanes))


def build(cfg: MixGridConfig, r_max: int) -> Method:
    """Mixed start by a grid; one model for all budgets."""
    count = len({0.0, *cfg.weights})
    return mixed_method("mix_grid", cfg, lambda ctx, memory, own: GridSearch(cfg), lambda high, low: count * high)


ENTRY = MethodEntry(
    name="mix_grid",
    config=MixGridConfig,
    build=build,
    title="Mix, grid",
    summary="mixes own and common LoRA by the best of five weights (rival of pFedGPT)",
    tiny={**TINY, "weights": (0, 0.5, 1)},
)
