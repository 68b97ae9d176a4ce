"""Mixed start by random search: HBO's space and its number of evaluations, and no process that learns from them.

What `pfedgpt` (Shen et al., EMNLP 2025) must beat if Bayesian optimisation is what helps (Bergstra and Bengio, 2012).
    theta_global -> SHARED    "global_*"
    theta_local  -> PRIVATE   "local_*", "change_*", "before_*", "slow_start.*"
Points are uniform in the space of stage 2, one weight per projection and cluster of layers; w = 0 and w = 1 are among
them, few rows choose the k best and all rows the best, as there. Ours: not a published method.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.methods.pfedgpt import TINY, Space, SpaceConfig, finished
from fedtailor.training.mix_trials import Choice, Trials, by_group
from fedtailor.training.mixed_start import Memory, mixed_method
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import DECIMALS, DesignSearch, ends
from fedtailor.training.validation_rows import ScoredOn


class MixRandomConfig(SpaceConfig):
    """Frame, space and finalists are pFedGPT's."""

    evaluations: Positive = 20
    """On few rows: those of both stages of HBO."""


@dataclass(frozen=True)
class RandomSearch:
    """Random search of the clients of a group, side by side."""

    cfg: MixRandomConfig
    ctx: ClientContext
    memory: Memory
    own: LoraAdapter

    def __call__(self, mixtures: Mixtures, lanes: Sequence[int], rows: Sequence[ScoredOn]) -> Choice:
        """Random points, then finalists."""
        cfg, trials = self.cfg, Trials(mixtures, lanes)
        space = Space.of(self.ctx, self.memory, self.own, lanes, cfg)
        spread = [by_group(groups) for groups in space.personal]
        searches = [self._design(k, int(groups.max()) + 1) for k, groups in zip(lanes, space.personal, strict=True)]
        trials.run(searches, spread, [each.low for each in rows], cfg.evaluations, cfg.parallel)
        return finished(trials, [search.known for search in searches], spread, rows, cfg)

    def _design(self, lane: int, dims: int) -> DesignSearch:
        ctx, cfg = self.ctx, self.cfg
        rng = numpy_rng(ctx.seed, ctx.stage, ctx.round, ctx.lanes[lane].client.id, "random")
        drawn = np.round(rng.random((cfg.evaluations, dims)), DECIMALS)
        return DesignSearch(np.concatenate([ends(dims)[: 2 * cfg.ends], drawn]))


def build(cfg: MixRandomConfig, r_max: int) -> Method:
    """Mixed start by random search; one model for all budgets."""

    def choose(ctx: ClientContext, memory: Memory, own: LoraAdapter) -> RandomSearch:
        return RandomSearch(cfg, ctx, memory, own)

    def reads(high: int, low: int) -> int:
        return cfg.evaluations * low + cfg.finalists * high

    return mixed_method("mix_random", cfg, choose, reads, cfg.delta_global)


ENTRY = MethodEntry(
    name="mix_random",
    config=MixRandomConfig,
    build=build,
    title="Mix, random",
    summary="mixes own and common LoRA by random search in pFedGPT's space (its rival)",
    tiny={**TINY, "evaluations": 4, "parallel": 2},
)
