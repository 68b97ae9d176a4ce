"""What a client's mixes are scored on: validation rows like its own, all of them and a few.

pFedGPT (Shen et al., EMNLP 2025, sections 4.3 and 4.4): of a pool that the server holds a client takes the n rows whose
embeddings are most similar to its own rows (V); a stratified sample of floor(alpha |V|) of them is its low fidelity.
The paper leaves the embedding, n and alpha open.
Ours: an embedding is the mean of the frozen base's last hidden states over a prompt's tokens, of length 1; similarity
is the cosine to the mean of the client's embeddings, equal to the mean cosine. Rows of a client's own in the place of
the pool, which the server does not see, are a switch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtailor.core.config import Config
from fedtailor.core.errors import MethodError
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.context import ClientContext, Lane
from fedtailor.lanes.batches import Examples, IntArray, LaneBatch, make_batch
from fedtailor.lanes.features import FEATURE_TOKENS, prompts_of
from fedtailor.lanes.net import LaneNet
from fedtailor.training.clusters import clusters, stratified
from fedtailor.training.search import Points

Share = Annotated[float, Field(gt=0, le=1)]


class ValidationConfig(Config):
    """Which rows a client's mixes are scored on."""

    validation: Literal["global_pool", "own_holdout"] = "global_pool"
    """``global_pool``: rows of ``task.validation_per_class``, which the server sees and no client trains on.
    ``own_holdout``: rows of the client's own, which it does not train on; its weight in the mean stays."""
    sample_weight: Share = 1.0
    """|V| as a share of the pool: 1 where clients are dealt by Dirichlet, 1/8 where each has one task (figure 3)."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """``own_holdout``: share of a client's rows, one at least; a client of one row trains on it and is scored by it."""
    low_share: Share = 0.25
    """alpha, rows of the low fidelity as a share of V."""
    redraw_low: bool = True
    """Draw them anew in every round (Algorithm 1), or once."""

    def sizes(self, train: int, pool: int) -> tuple[int, int]:
        """Rows of V and of its sample, of a client with ``train`` rows where the pool has ``pool``."""
        whole = self.sample_weight * pool if self.validation == "global_pool" else self.holdout * train
        high = max(1, round(whole))
        return high, max(1, math.floor(self.low_share * high))


@dataclass(frozen=True)
class ScoredOn:
    """V and its stratified sample."""

    high: Examples
    low: Examples


@dataclass(frozen=True)
class ValidationRows:
    """Chooses them; embeddings and clusters are kept, since the base is frozen.

    Args:
        cfg: which.
    """

    cfg: ValidationConfig
    _embedded: dict[tuple[str, str], Points] = field(default_factory=dict, compare=False)
    _clustered: dict[tuple[str, str], IntArray] = field(default_factory=dict, compare=False)

    def trained_on(self, ctx: ClientContext) -> ClientContext:
        """The clients with the rows that they train on."""
        if self.cfg.validation == "global_pool":
            return ctx
        lanes = [replace(lane, train=lane.train.rows(self._held_out(ctx, lane)[0])) for lane in ctx.lanes]
        return ctx.with_lanes(lanes)

    def of(self, ctx: ClientContext, lanes: Sequence[int]) -> list[ScoredOn]:
        """The rows of each of these lanes, whose ``train`` is all that its client has.

        Raises:
            MethodError: there is no pool.
        """
        return [self._of(ctx, ctx.lanes[k]) for k in lanes]

    def _of(self, ctx: ClientContext, lane: Lane) -> ScoredOn:
        high = self._similar(ctx, lane)
        where = (ctx.round, ctx.stage) if self.cfg.redraw_low else ()
        rng = numpy_rng(ctx.seed, lane.client.id, "low-fidelity", *where)
        key = (lane.client.id, _content(high))
        if key not in self._clustered:
            points = self._embeddings(ctx, lane, high)
            self._clustered[key] = clusters(points, (ctx.seed, lane.client.id, "validation"))
        low = stratified(self._clustered[key], self._sizes(ctx, lane)[1], rng)
        return ScoredOn(high, high.rows(low))

    def _similar(self, ctx: ClientContext, lane: Lane) -> Examples:
        if self.cfg.validation == "own_holdout":
            return lane.train.rows(self._held_out(ctx, lane)[1])
        if ctx.validation is None or not len(ctx.validation):
            raise MethodError("there is no validation pool: set 'task.validation_per_class', or validation=own_holdout")
        count, _ = self._sizes(ctx, lane)
        if count == len(ctx.validation):
            return ctx.validation
        similar = self._embeddings(ctx, lane, ctx.validation) @ self._embeddings(ctx, lane, lane.train).mean(0)
        return ctx.validation.rows(np.sort(np.argsort(-similar, kind="stable")[:count]))

    def _sizes(self, ctx: ClientContext, lane: Lane) -> tuple[int, int]:
        return self.cfg.sizes(lane.size, 0 if ctx.validation is None else len(ctx.validation))

    def _held_out(self, ctx: ClientContext, lane: Lane) -> tuple[IntArray, IntArray]:
        """Rows to train on and rows to be scored on."""
        order = numpy_rng(ctx.seed, lane.client.id, "holdout").permutation(lane.size)
        held, _ = self._sizes(ctx, lane)
        kept = max(1, lane.size - held)
        return np.sort(order[:kept]), np.sort(order[-held:])

    def _embeddings(self, ctx: ClientContext, lane: Lane, examples: Examples) -> Points:
        # The base is everybody's, unless clients keep a part of it.
        key = (lane.client.id if ctx.net.overlay_index else "", _content(examples))
        if key not in self._embedded:
            ctx.net.place([lane.client.id])
            self._embedded[key] = prompt_embeddings(ctx.net, examples, ctx.pad_id)
        return self._embedded[key]


@torch.no_grad()
def prompt_embeddings(net: LaneNet, examples: Examples, pad_id: int) -> Points:
    """Mean last hidden state of each prompt (or text) by the base alone, of length 1, (n, d)."""
    answers = examples.prompt_length is not None
    if examples.prompt_length is not None:
        examples = prompts_of(examples, examples.prompt_length, pad_id)
    each = max(1, FEATURE_TOKENS // int(examples.lengths.max()))
    found = []
    net.train_mode(False)
    net.state.bypass = True
    try:
        for start in range(0, len(examples), each):
            rows = np.arange(start, min(start + each, len(examples)))
            batch = make_batch([examples], [rows], pad_id, net.device)
            hidden = (net.hidden(batch) if answers else _encoded(net, batch)).double()
            mask = batch.attention_mask.flatten(0, 1).unsqueeze(-1)
            means = (hidden * mask).sum(1) / mask.sum(1)
            found.append(torch.nn.functional.normalize(means, dim=1).cpu().numpy())
    finally:
        net.state.bypass = False
    return np.concatenate(found)


def _encoded(net: LaneNet, batch: LaneBatch) -> Tensor:
    """An encoder's last hidden states, (b, T, d)."""
    net.state.shapes, net.state.rows = batch.shapes, batch.input_ids.shape[1]
    with net.autocast():
        found: Tensor = net.model.base_model(  # type: ignore[operator]
            input_ids=batch.input_ids.flatten(0, 1), attention_mask=batch.attention_mask.flatten(0, 1)
        )[0]
    return found


def _content(examples: Examples) -> str:
    """Names examples by what is in them."""
    parts = [examples.input_ids, examples.lengths, examples.prompt_length, examples.first_segment_length]
    known = hashlib.blake2s()
    for part in parts:
        known.update(b"-" if part is None else f"{part.shape}".encode() + np.ascontiguousarray(part).tobytes())
    return known.hexdigest()
