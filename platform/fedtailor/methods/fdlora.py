"""FDLoRA's fusion: every round begins at w_l theta_local + w_g theta_global, two free weights found without gradients.

Paper: Qi, Luan, Huang, Fung, Yang, Qian, "FDLoRA: Personalized Federated Learning of Large Language Model via Dual LoRA
Tuning" (arXiv 2406.07925), its adaptive fusion, whose search is LoraHub's (Huang et al., COLM 2024): weights in
[-1.5, 1.5], loss plus 0.05 (|w_l| + |w_g|), no gradient.
    theta_global -> SHARED    "global_*"
    theta_local  -> PRIVATE   "local_*", "slow_start.*"
Ours, so that it is a rival of `pfedgpt` and nothing else differs: the fusion is where a round begins, while FDLoRA
trains a personal LoRA by itself, joins the common one by steps of an outer optimizer, and fuses both in the end; the
search is a (1, n) evolution strategy around the best point, whose step grows by half where it succeeds and shrinks by
a quarter where it does not, as often as HBO evaluates, in the place of Nevergrad's; finalists, with (0, 1) and (1, 0),
are scored on all of V as there, without the penalty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

import numpy as np
from pydantic import Field

from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import Positive
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.methods.pfedgpt import TINY
from fedtailor.training.mix_trials import Choice, Spread, Trials
from fedtailor.training.mixed_start import MixConfig, mixed_method
from fedtailor.training.mixing import Mixtures
from fedtailor.training.search import DECIMALS, Known, Points, unknown
from fedtailor.training.validation_rows import ScoredOn

RECEIVED, OWN = np.array([[0.0, 1.0]]), np.array([[1.0, 0.0]])
"""(w_l, w_g) of the common LoRA, and of the client's own."""
_FIRST: Final = np.concatenate([RECEIVED, OWN, [[0.5, 0.5], [0.0, 0.0]]])
_STEP, _GROWS, _SHRINKS = 0.5, 1.5, 0.75


class FdLoraConfig(MixConfig):
    """Frame and rates are pFedGPT's; bound and penalty LoraHub's."""

    bound: Annotated[float, Field(ge=1)] = 1.5
    penalty: Annotated[float, Field(ge=0)] = 0.05
    evaluations: Positive = 20
    """On few rows: those of both stages of HBO."""
    top: Positive = 3
    parallel: Positive = 4
    """Points of a generation, a lane each."""


@dataclass
class EvolutionSearch:
    """Gaussian steps from the best point.

    Args:
        cfg: bound and penalty.
        coordinates: of its random numbers.
    """

    cfg: FdLoraConfig
    coordinates: tuple[int | str, ...]
    known: Known = field(default_factory=lambda: Known.none(2))
    step: float = _STEP
    _asked: Points = field(default_factory=lambda: np.empty((0, 2)))

    def ask(self, most: int) -> Points:
        """The first points, then a generation."""
        left = unknown(_FIRST, self.known.x)
        if not len(left):
            rng = numpy_rng(*self.coordinates, len(self.known.y))
            drawn = self.known.best(1) + self.step * rng.standard_normal((4 * most, 2))
            inside = np.clip(drawn, -self.cfg.bound, self.cfg.bound)
            left = unknown(np.round(inside, DECIMALS), self.known.x)
        self._asked = left[:most]
        return self._asked

    def tell(self, values: Points) -> None:
        """Keeps the penalised values, and changes the step."""
        worth = values + self.cfg.penalty * np.abs(self._asked).sum(1)
        if len(self.known.y) >= len(_FIRST) and len(worth):
            self.step *= _GROWS if worth.min() < self.known.y.min() else _SHRINKS
        self.known.add(self._asked, worth)


@dataclass(frozen=True)
class Fusion:
    """Searches of the clients of a group, side by side."""

    cfg: FdLoraConfig
    ctx: ClientContext

    def __call__(self, mixtures: Mixtures, lanes: Sequence[int], rows: Sequence[ScoredOn]) -> Choice:
        """Generations, then finalists."""
        ctx, cfg, trials = self.ctx, self.cfg, Trials(mixtures, lanes)
        spread: list[Spread] = [_at_all_layers(len(mixtures.layers))] * len(lanes)
        where = [(ctx.seed, ctx.stage, ctx.round, ctx.lanes[k].client.id, "fusion") for k in lanes]
        searches = [EvolutionSearch(cfg, coordinates) for coordinates in where]
        trials.run(searches, spread, [each.low for each in rows], cfg.evaluations, cfg.parallel)
        known, always = [search.known for search in searches], np.concatenate([RECEIVED, OWN])
        return trials.decided(known, spread, rows, cfg.top, [always] * len(lanes), [RECEIVED] * len(lanes))


def _at_all_layers(layers: int) -> Spread:
    return lambda points: np.repeat(points[:, np.newaxis], layers, 1)


def build(cfg: FdLoraConfig, r_max: int) -> Method:
    """FDLoRA's fusion; one model for all budgets."""

    def reads(high: int, low: int) -> int:
        return cfg.evaluations * low + (cfg.top + 2) * high

    return mixed_method("fdlora", cfg, lambda ctx, memory, own: Fusion(cfg, ctx), reads)


ENTRY = MethodEntry(
    name="fdlora",
    config=FdLoraConfig,
    build=build,
    title="FDLoRA",
    summary="fuses own and common LoRA by two weights found without gradients (Qi et al. 2024)",
    tiny={**TINY, "evaluations": 6, "parallel": 2},
)
