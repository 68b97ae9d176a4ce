"""Mixes of a client's own LoRA and the one that it received, scored many at a time: a mix is a lane.

With one weight w per adapted layer, 1 being the client's own (Shen et al., EMNLP 2025, section 4.2),

    factors:  A = w A_l + (1 - w) A_g,  B = w B_l + (1 - w) B_g
    product:  B A = the best approximation of w B_l A_l + (1 - w) B_g A_g that has rank r

Mixing A and B by themselves is not mixing B A: it has w (1 - w) (B_l - B_g) (A_l - A_g) too little. That is in the
paper's formula; ``product`` is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.federated.context import ClientContext
from fedtailor.lanes.batches import Examples, LaneBatch, scoring_batches
from fedtailor.lanes.layers import AdaptedLayer, narrowed
from fedtailor.lanes.loss import target_losses
from fedtailor.lanes.params import LaneParams
from fedtailor.models.families import IN_BLOCK
from fedtailor.training.search import Points

Rule = Literal["factors", "product"]


@dataclass(frozen=True)
class Mixtures:
    """All mixes of the clients' two LoRAs.

    Args:
        ctx: the clients.
        adapter: names and places of A and B.
        own: the clients' own A and B, by these names, (K, *shape).
        received: those that they received, likewise.
        rule: what is mixed.
    """

    ctx: ClientContext
    adapter: LoraAdapter
    own: Mapping[str, Tensor]
    received: Mapping[str, Tensor]
    rule: Rule = "factors"

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The L layers that are mixed."""
        return self.adapter.layers_of(self.ctx.net)

    def mixed(self, clients: Sequence[int], shares: Points) -> dict[str, Tensor]:
        """A and B of n mixes, (n, *shape) each.

        Args:
            clients: the lane in ``ctx`` that each is of.
            shares: of the client's own LoRA and of the received one, (n, L, 2).
        """
        rows, found = list(clients), dict[str, Tensor]()
        for number, layer in enumerate(self.layers):
            names = [f"{self.adapter.prefix}_{matrix}.{layer.name}" for matrix in "AB"]
            pairs = [(self.own[name][rows], self.received[name][rows]) for name in names]
            share = torch.from_numpy(shares[:, number]).to(pairs[0][0]).view(-1, 2, 1, 1)
            both = [share[:, 0] * mine + share[:, 1] * theirs for mine, theirs in pairs]
            if self.rule == "product":
                inside = ~((share == 0) | (share == 1)).all(1)  # either LoRA itself has its rank already
                products = _product(pairs, share, self.adapter.rank)
                both = [torch.where(inside, new, old) for new, old in zip(products, both, strict=True)]
            found |= dict(zip(names, both, strict=True))
        return found

    @torch.no_grad()
    def losses(self, clients: Sequence[int], shares: Points, texts: Sequence[Examples]) -> Points:
        """Mean loss of each mix over all targets of its texts, (n,); nothing stays bound.

        Mixes go through the model side by side, as many as the token budget takes: those of one client on the same
        rows, those of other clients beside them.

        Args:
            clients: as in `mixed`.
            shares: as in `mixed`.
            texts: what each mix is scored on.
        """
        found = []
        for start, stop in self.groups(texts):
            params = self.bound(clients[start:stop], shares[start:stop], trained=False)
            found += self._scored(params.lanes, texts[start:stop])
        self.ctx.net.unbind()
        return np.array(found)

    def bound(self, clients: Sequence[int], shares: Points, trained: bool) -> LaneParams:
        """Parameters that hold the mixes, a lane each, and are what the model computes with."""
        ctx = self.ctx
        ctx.net.unbind()
        params = LaneParams(
            self.adapter.specs(ctx.net), len(clients), ctx.net.device, ctx.net.param_dtype, trained=trained
        )
        for name, value in self.mixed(clients, shares).items():
            params.set(name, value)
        self.adapter.bind(ctx.net, params)
        ctx.net.place([ctx.lanes[k].client.id for k in clients])
        ctx.net.train_mode(False)
        return params

    def groups(self, texts: Sequence[Examples]) -> list[tuple[int, int]]:
        """Runs of mixes whose longest rows fit the token budget together, a row each; at least one mix."""
        runs, start = [], 0
        while start < len(texts):
            stop, width = start + 1, int(texts[start].lengths.max())
            while stop < len(texts):
                width = max(width, int(texts[stop].lengths.max()))
                if (stop + 1 - start) * width > self.ctx.token_budget:
                    break
                stop += 1
            runs.append((start, stop))
            start = stop
        return runs

    def _scored(self, lanes: int, texts: Sequence[Examples]) -> list[float]:
        ctx = self.ctx
        total, count = (torch.zeros(lanes, dtype=torch.float64, device=ctx.net.device) for _ in range(2))
        with narrowed(ctx.net.layers, ctx.net.compute_type):
            for batch, rows in scoring_batches(texts, ctx.pad_id, self.tokens(texts), ctx.net.device):
                counted = counted_targets(batch, [len(own) for own in rows])
                total += (target_losses(ctx.net, batch).double() * counted).sum(1)
                count += counted.sum(1)
        values: list[float] = (total / count).tolist()
        return values

    def tokens(self, texts: Sequence[Examples]) -> int:
        """Of one forward pass over all lanes: the token budget, or what ``micro_batch`` rows a lane may be."""
        ctx, longest = self.ctx, max(int(each.lengths.max()) for each in texts)
        return min(ctx.token_budget, (ctx.micro_batch or ctx.token_budget) * longest * len(texts))


def projections(modules: Sequence[str]) -> list[str]:
    """Projection type of each module: of its path inside its block as much of the end as tells it from others.

    A module outside of the blocks is a type of its own, by its whole name.

    >>> projections(["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "classifier"])
    ['q_proj', 'v_proj', 'classifier']
    """
    paths = [found[2] if (found := IN_BLOCK.search(module)) else None for module in modules]
    among = {path for path in paths if path}
    return [_shortest(path, among) if path else module for path, module in zip(paths, modules, strict=True)]


def _shortest(path: str, among: set[str]) -> str:
    words = path.split(".")
    endings = [".".join(words[start:]) for start in reversed(range(len(words)))]
    alone = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in among) == 1)
    return next(alone, path)


def layer_labels(modules: Sequence[str]) -> list[str]:
    """Projection and block of each module: ``q_proj.0``; outside of the blocks its name.

    >>> layer_labels(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"])
    ['q_proj.0', 'q_proj.1']
    """
    blocks = [found[1] if (found := IN_BLOCK.search(module)) else None for module in modules]
    return [
        kind if block is None else f"{kind}.{block}" for kind, block in zip(projections(modules), blocks, strict=True)
    ]


def counted_targets(batch: LaneBatch, rows: Sequence[int]) -> Tensor:
    """Which targets are of the first ``rows[k]`` rows of lane k, (k, m) bool: later ones only fill it up."""
    column = torch.arange(batch.labels.shape[1], device=batch.labels.device).expand_as(batch.labels)
    row = column if batch.target_row is None else batch.target_row
    return batch.valid & (row < torch.tensor(rows, device=row.device).unsqueeze(1))


def _product(pairs: Sequence[tuple[Tensor, Tensor]], share: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (n, r, d_in) and B (n, d_out, r) of the best approximation of the mixed products.

    Singular values are split evenly between both; of each singular pair the largest number in A is positive.
    """
    (a_own, a_received), (b_own, b_received) = pairs
    left, up = torch.linalg.qr(torch.cat([share[:, 0] * b_own, share[:, 1] * b_received], 2))
    right, down = torch.linalg.qr(torch.cat([a_own, a_received], 1).transpose(1, 2))
    u, s, v = torch.linalg.svd(up @ down.transpose(1, 2), full_matrices=False)
    root = s[:, :rank].sqrt()
    b = left @ u[:, :, :rank] * root.unsqueeze(1)
    a = root.unsqueeze(2) * v[:, :rank] @ right.transpose(1, 2)
    sign = a.gather(2, a.abs().argmax(2, keepdim=True)).sign()
    sign = torch.where(sign == 0, torch.ones_like(sign), sign)
    missing = rank - a.shape[1]  # a layer narrower than the rank
    a, b = a * sign, b * sign.transpose(1, 2)
    return torch.nn.functional.pad(a, (0, 0, 0, missing)), torch.nn.functional.pad(b, (0, missing))
