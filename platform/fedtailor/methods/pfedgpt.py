"""pFedGPT: every round begins at a mix of own and common LoRA, found by hierarchical Bayesian optimisation (HBO).

Paper: Shen, Xu, Wang, Li, Pan, "pFedGPT: Hierarchically Optimizing LoRA Aggregation Weights for Personalized Federated
GPT Models", EMNLP 2025, Algorithm 1 and sections 4.2 to 4.5. Its public code lacks HBO.
    theta_global -> SHARED    "global_*"   A and B of the adapted layers
    theta_local  -> PRIVATE   "local_*"    what the client trained last
    Delta        -> PRIVATE   "change_*"   what that changed; "before_*": what was received then
    L_t, flag    -> PRIVATE   "slow_start.*"
    w            -> ctx.received and theta_local make w theta_local + (1 - w) theta_global
HBO minimises the mean loss on validation rows. Stage 1: one w per projection type. Stage 2: one per projection and
cluster of layers (four numbers each: delta_A, delta_B, Delta_A, Delta_B); its process starts from stage 1's pairs, each
w copied to its projection's clusters. Both see few rows (V_low); the k best are scored on all of V, and the best wins.
Frame, rows, clusters and search: `training.mixed_start`, `validation_rows`, `clusters`, `search`.
Ours, where the paper says nothing: evaluations, k, kernel, acquisition, clustering. Also:
- w = 0 (common) and w = 1 (own) are always among the candidates, so that HBO never does worse than both on V;
- Delta_global is the common LoRA's own change between two rounds of the client (``global_difference``). The paper's is
  the mean of the clients' changes, which the server cannot know from what is sent, since HBO gives every client another
  start. ``mean_of_changes`` sends them (SHARED "mean_change_*"), which doubles what goes up and down;
- the mean over clients is that of the aggregation, weighted by examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import model_validator

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.lanes.batches import Examples, IntArray
from fedtailor.training.clusters import clusters, layer_features
from fedtailor.training.mix_trials import Choice, Spread, Trials, by_group
from fedtailor.training.mixed_start import Changes, Memory, MixConfig, mixed_method
from fedtailor.training.mixing import Mixtures, projections
from fedtailor.training.search import BayesianSearch, Known, ends, sobol, unknown
from fedtailor.training.validation_rows import ScoredOn


class SpaceConfig(MixConfig):
    """The personalised space and how often it is looked at. All numbers are ours: the paper gives none."""

    delta_global: Changes = "global_difference"
    """Where the common LoRA's change comes from; see the module."""
    clusters: Positive | None = None
    """Clusters of each projection's layers; None: by silhouette, 1 to 4."""
    top: Positive = 3
    """k, mixes of the lowest loss on few rows that are scored on all."""
    parallel: Positive = 4
    """Mixes of a client that are scored side by side, each a lane."""
    ends: bool = True
    """w = 0 and w = 1 are always candidates."""

    @property
    def finalists(self) -> int:
        """Most mixes that are scored on all of V, the common LoRA included."""
        return self.top + max(1, 2 * self.ends)


class PFedGptConfig(SpaceConfig):
    """HBO's budget; variants of Table 4 evaluate as often as the whole."""

    evaluations: tuple[Positive, Positive] = (8, 12)
    """On few rows, of stage 1 and of stage 2; where there is one stage, it takes both."""
    initial: Positive = 5
    """Points before the first fit: w = 0, w = 1, then Sobol's."""
    stages: Literal["one", "two", "both"] = "both"
    fidelity: Literal["low", "high", "low_to_high"] = "low_to_high"
    """Rows of V that decide: few, all, or few until the k best."""

    @model_validator(mode="after")
    def _initial_fits(self) -> PFedGptConfig:
        first = next(count for count in self.budget if count)
        if first < self.initial:
            raise ValueError(
                f"'pfedgpt.evaluations': the first stage has {first}, and it begins with 'pfedgpt.initial' = "
                f"{self.initial} points that are not searched for (allowed: {self.initial} or more, or a smaller "
                "'pfedgpt.initial')"
            )
        if self.ends and self.initial < 2:
            raise ValueError(
                "'pfedgpt.initial' = 1 has no room for w = 0 and w = 1 (allowed: 2 or more, or pfedgpt.ends=false)"
            )
        return self

    @property
    def budget(self) -> tuple[int, int]:
        """Evaluations of both stages; those of the finalists too, where there are none."""
        first, second = self.evaluations
        spare = self.top + 2 * self.ends if self.fidelity != "low_to_high" else 0
        return {"one": (first + second + spare, 0), "two": (0, first + second + spare)}.get(
            self.stages, (first, second + spare)
        )


@dataclass(frozen=True)
class Space:
    """Which weight is whose.

    Args:
        basic: projection of each layer, (L,).
        personal: of each client, its layers' clusters, numbered through all projections, (L,).
    """

    basic: IntArray
    personal: list[IntArray]

    @classmethod
    def of(cls, ctx: ClientContext, memory: Memory, own: LoraAdapter, lanes: Sequence[int], cfg: SpaceConfig) -> Space:
        """Clusters the layers of every projection of every client."""
        kinds = projections([layer.name for layer in own.layers_of(ctx.net)])
        names = list(dict.fromkeys(kinds))
        basic = np.array([names.index(kind) for kind in kinds])
        personal = []
        for k, distances in zip(lanes, memory.distances(ctx, lanes, own), strict=True):
            index, groups = np.zeros(len(basic), np.int64), 0
            for number, name in enumerate(names):
                members = np.flatnonzero(basic == number)
                where = (ctx.seed, ctx.stage, ctx.round, ctx.lanes[k].client.id, name)
                labels = clusters(layer_features(distances[members]), where, cfg.clusters)
                index[members] = groups + labels
                groups += int(labels.max()) + 1
            personal.append(index)
        return cls(basic, personal)

    def parents(self, client: int) -> IntArray:
        """The projection of each of a client's weights, (d,)."""
        own = self.personal[client]
        return np.array([self.basic[np.flatnonzero(own == group)[0]] for group in range(int(own.max()) + 1)])


@dataclass(frozen=True)
class HierarchicalSearch:
    """HBO of the clients of a group, side by side."""

    cfg: PFedGptConfig
    ctx: ClientContext
    memory: Memory
    own: LoraAdapter

    def __call__(self, mixtures: Mixtures, lanes: Sequence[int], rows: Sequence[ScoredOn]) -> Choice:
        """Stage 1, stage 2, finalists."""
        cfg, trials = self.cfg, Trials(mixtures, lanes)
        space = Space.of(self.ctx, self.memory, self.own, lanes, cfg)
        texts = [each.high if cfg.fidelity == "high" else each.low for each in rows]
        first, second = cfg.budget
        dims = int(space.basic.max()) + 1
        known, spread = [Known.none(dims) for _ in lanes], [by_group(space.basic)] * len(lanes)
        if first:
            searches = [self._search(k, Known.none(dims), 1) for k in lanes]
            trials.run(searches, spread, texts, first, cfg.parallel)
            known = [search.known for search in searches]
        if second:
            known = [_copied(own, space.parents(i)) for i, own in enumerate(known)]
            spread = [by_group(groups) for groups in space.personal]
            searches = [self._search(k, own, 2) for k, own in zip(lanes, known, strict=True)]
            trials.run(searches, spread, texts, second, cfg.parallel)
        return finished(trials, known, spread, rows, cfg, None if cfg.fidelity == "low_to_high" else texts)

    def _search(self, lane: int, known: Known, stage: int) -> BayesianSearch:
        ctx, cfg = self.ctx, self.cfg
        where = (ctx.seed, ctx.stage, ctx.round, ctx.lanes[lane].client.id, "hbo", stage)
        dims = known.x.shape[1]
        design = np.empty((0, dims))
        if not len(known.y):
            both = ends(dims)[: 2 * cfg.ends]
            design = unknown(np.concatenate([both, sobol(dims, cfg.initial - len(both), *where, "design")]))
        return BayesianSearch(known, design, where)


def _copied(known: Known, parents: IntArray) -> Known:
    """Stage 1's pairs in the space of stage 2: each weight copied to its projection's clusters."""
    return Known(known.x[:, parents], known.y)


def finished(
    trials: Trials,
    known: Sequence[Known],
    spread: Sequence[Spread],
    rows: Sequence[ScoredOn],
    cfg: SpaceConfig,
    texts: Sequence[Examples] | None = None,
) -> Choice:
    """The best mix of each client: of the k best, scored again on all rows, or of what is known on ``texts``."""
    both = [ends(own.x.shape[1]) for own in known]
    received = [pair[:1] for pair in both]
    if texts is not None:
        return trials.best(known, spread, texts, received)
    return trials.decided(known, spread, rows, cfg.top, [pair[: 2 * cfg.ends] for pair in both], received)


def build(cfg: PFedGptConfig, r_max: int) -> Method:
    """PFedGPT; the rank is its own, one model for all budgets."""

    def choose(ctx: ClientContext, memory: Memory, own: LoraAdapter) -> HierarchicalSearch:
        return HierarchicalSearch(cfg, ctx, memory, own)

    def reads(high: int, low: int) -> int:
        count = sum(cfg.budget)
        if cfg.fidelity == "low_to_high":
            return count * low + cfg.finalists * high
        return (count + 1) * (high if cfg.fidelity == "high" else low)

    return mixed_method("pfedgpt", cfg, choose, reads, cfg.delta_global)


TINY: dict[str, Any] = {
    "lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "dropout": 0.2,
    "validation": "own_holdout", "slow_start": False,
}  # fmt: skip
"""Of all methods that mix."""

ENTRY = MethodEntry(
    name="pfedgpt",
    config=PFedGptConfig,
    build=build,
    title="pFedGPT",
    summary="mixes own and common LoRA by hierarchical Bayesian optimisation (Shen et al. 2025)",
    base=False,
    colour="#882255",
    marker="*",
    tiny={**TINY, "evaluations": (3, 3), "initial": 2, "parallel": 2},
)
