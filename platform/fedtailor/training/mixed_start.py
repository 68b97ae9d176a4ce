"""Rounds that begin at a mix of a client's own LoRA and the one that it received: pFedGPT's frame, whoever mixes.

Shen et al., EMNLP 2025, Algorithm 1. A round at a client: (1) it begins at the received LoRA while it is new or its
slow start lasts, then at the mix that its chooser finds; (2) it trains; (3) it sends what it trained, and keeps it as
its own. The model of a client is the one that it trained last, or (a switch) one more mix of it.

Slow start (section 4.5), by the mean training loss of each round in two windows:

    Delta_t = |mean(L_t) - mean(L_t-1)| / max(mean(L_t-1), eps);

it ends for good when Delta_t < delta_max or t >= T_max.
The text says evaluation loss there, the formula training loss. (The paper's flag is True when it is over.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from fedtailor.adapters.lora import AdapterPair, LoraAdapter, Targets
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, Personalised, Report
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.net import LaneNet
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import FinetuneConfig
from fedtailor.training.local import train
from fedtailor.training.mix_trials import Chooser
from fedtailor.training.mixing import Mixtures, Rule, layer_labels
from fedtailor.training.search import Points
from fedtailor.training.validation_rows import ValidationConfig, ValidationRows

Changes = Literal["global_difference", "mean_of_changes"]


class MixConfig(FinetuneConfig, ValidationConfig):
    """Defaults: the public code's LoRA and one epoch a round (its launchers), the rate of FedIT on Dolly; the paper
    gives no number of the slow start, these are ours."""

    lr: Rate = 1.5e-4
    epochs: Positive = 1
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    rank: Positive = 8
    targets: Targets = ("query", "value")
    """Layers that get a LoRA: all, ``body``, ``head``, or endings of module paths."""
    mix: Rule = "factors"
    """What is mixed: A and B by themselves (the paper), or their product, cut to the rank."""
    final: Literal["trained", "mixed"] = "trained"
    """A client's model in the end: what it trained last (Algorithm 1), or the mix of that with the last common LoRA,
    without training (which the public code makes, too, and does not score)."""
    slow_start: bool = True
    window: Positive = 2
    """Rounds of a window."""
    delta_max: Annotated[float, Field(ge=0)] = 0.05
    t_max: Annotated[int, Field(ge=1)] = 8
    """Rounds after which slow start is over in any case."""
    eps: Rate = 1e-8


@dataclass(frozen=True)
class Memory:
    """What a client keeps beside its LoRA, and what it sends beside it.

    PRIVATE "change_*", what its last round changed, and "before_*", what it received then, or in its place SHARED
    "mean_change_*", the mean of the clients' changes; PRIVATE "slow_start.*", the losses of its last rounds (the newest
    last), their number, and whether slow start is over. All begin at zero. One of a method's ``modules``.

    Args:
        shared: the LoRA that is sent.
        changes: where the global LoRA's change comes from; None: nobody asks for changes.
        cfg: of the slow start.
    """

    shared: LoraAdapter
    changes: Changes | None
    cfg: MixConfig

    def specs(self, net: LaneNet) -> Sequence[ParamSpec]:
        """Changes first."""
        kept: dict[str, Scope] = {}
        if self.changes is not None:
            kept = {"change": Scope.PRIVATE}
            kept |= {"before": Scope.PRIVATE} if self.changes == "global_difference" else {"mean_change": Scope.SHARED}
        tensors = [
            ParamSpec(f"{prefix}_{name}", spec.shape, scope)
            for prefix, scope in kept.items()
            for name, spec in zip(self.short(net), self.shared.specs(net), strict=True)
        ]
        sizes = {"losses": 2 * self.cfg.window, "rounds": 1, "over": 1} if self.cfg.slow_start else {}
        return [*tensors, *(ParamSpec(f"slow_start.{name}", (n,), Scope.PRIVATE) for name, n in sizes.items())]

    def initial(self, net: LaneNet, seed: int) -> Mapping[str, Tensor]:
        """All zero."""
        return {}

    def short(self, net: LaneNet) -> list[str]:
        """Names of the shared LoRA's parameters without its prefix: "A.module", "B.module"."""
        return [name.removeprefix(f"{self.shared.prefix}_") for name in self.shared.names(net)]

    def mixing(self, ctx: ClientContext) -> Tensor:
        """Which clients mix: those that have a LoRA of their own, and whose slow start is over; (K,) bool."""
        if not self.cfg.slow_start:
            return ~ctx.fresh
        rounds = ctx.rounds if ctx.stage == "personalise" else ctx.round
        return ~ctx.fresh & ((ctx.params["slow_start.over"][:, 0] > 0) | (rounds >= self.cfg.t_max))

    @torch.no_grad()
    def keep(self, ctx: ClientContext, start: Mapping[str, Tensor], loss: Tensor) -> None:
        """Notes a round down: ``start``, (K, *shape), by names as sent, and its mean loss (K,)."""
        params = ctx.params
        if self.changes is not None:
            for short, name in zip(self.short(ctx.net), start, strict=True):
                params.set(f"change_{short}", params[name] - start[name])
                if self.changes == "global_difference":
                    params.set(f"before_{short}", ctx.received[name].clone())
                else:
                    params.set(f"mean_change_{short}", params[f"change_{short}"])
        if self.cfg.slow_start:
            losses, rounds = params["slow_start.losses"], params["slow_start.rounds"]
            losses.copy_(torch.cat([losses[:, 1:], loss.to(losses).unsqueeze(1)], 1))
            rounds += 1
            early, late = (part.mean(1) for part in torch.split(losses, self.cfg.window, 1))
            flat = (late - early).abs() / early.clamp_min(self.cfg.eps) < self.cfg.delta_max
            ends = flat & (rounds[:, 0] >= 2 * self.cfg.window)
            params["slow_start.over"][ends] = 1.0

    @torch.no_grad()
    def distances(self, ctx: ClientContext, lanes: Sequence[int], own: LoraAdapter) -> Points:
        """How far a client's LoRA is from the received one, (n, L, 4): mean squares of the differences of A and of B,
        then of their changes (section 4.3: delta_A, delta_B, Delta_A, Delta_B)."""
        ours, received, rows, columns = ctx.params, ctx.received, list(lanes), []
        for short in self.short(ctx.net):
            name = f"{self.shared.prefix}_{short}"
            if self.changes == "global_difference":
                common = received[name] - ours[f"before_{short}"]
            else:
                common = received[f"mean_change_{short}"]
            for one, other in ((ours[f"{own.prefix}_{short}"], received[name]), (ours[f"change_{short}"], common)):
                columns.append((one - other)[rows].double().square().flatten(1).mean(1))
        # Per layer: A's two, then B's two.
        found = torch.stack(columns, 1).view(len(rows), -1, 4)[:, :, [0, 2, 1, 3]]
        return found.cpu().numpy()


@dataclass(frozen=True)
class MixedStart:
    """A round, from a mix.

    Args:
        cfg: how.
        pair: the LoRA that is sent, and the client's own.
        memory: what else is kept.
        rows: chooses what mixes are scored on.
        choose: chooses the mix.
    """

    cfg: MixConfig
    pair: AdapterPair
    memory: Memory
    rows: ValidationRows
    choose: Callable[[ClientContext], Chooser]

    def __call__(self, ctx: ClientContext) -> Report:
        """One client's part of a round; metrics as `mixed` gives them, and ``slow_start``, 1 while it lasts."""
        mixing = self.memory.mixing(ctx)
        begun, metrics = self.mixed(ctx, mixing)
        self.pair.switch(ctx.net, ctx.params, "first")
        ctx.net.place([lane.client.id for lane in ctx.lanes])
        names = self.pair.first.names(ctx.net)
        for name, value in begun.items():
            ctx.params[name].detach()[mixing] = value
        start = {name: ctx.params[name].detach().clone() for name in names}
        loss = train(self.rows.trained_on(ctx), [AdamGroup(names, self.cfg.lr)], self.cfg.training("train")).loss
        self.memory.keep(ctx, start, loss)
        for own, sent in zip(self.pair.second.names(ctx.net), names, strict=True):
            ctx.params.set(own, ctx.params[sent])
        return Report({"train_loss": loss, "slow_start": (~mixing).to(loss), **metrics})

    def mixed(self, ctx: ClientContext, mixing: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The mixes of the clients that mix, by names as sent, (n, *shape), and what is measured of all, (K,).

        ``mix_evaluations``, ``mix_tokens`` (of the rows that they were scored on), ``mix_gain`` (loss of the received
        LoRA less that of the mix on the rows that decided) and ``mix_weight.PROJECTION.BLOCK``, the share of the
        client's own LoRA at each layer; all 0 where nothing is mixed.
        """
        lanes = [k for k, does in enumerate(mixing.tolist()) if does]
        layers = self.pair.first.layers_of(ctx.net)
        count = len(ctx.lanes)
        shares, counted = np.zeros((count, len(layers), 2)), np.zeros((3, count))
        shares[:, :, 1] = 1.0
        values = dict[str, Tensor]()
        if lanes:
            sent, own = self.pair.first.names(ctx.net), self.pair.second.names(ctx.net)
            mixtures = Mixtures(
                ctx, self.pair.first, {name: ctx.params[mine].detach() for name, mine in zip(sent, own, strict=True)},
                {name: ctx.received[name].clone() for name in sent}, self.cfg.mix,
            )  # fmt: skip
            started = time.perf_counter()
            choice = self.choose(ctx)(mixtures, lanes, self.rows.of(ctx, lanes))
            values = mixtures.mixed(lanes, choice.shares)
            share = (time.perf_counter() - started) / len(lanes)
            ctx.searched.update((ctx.lanes[k].client.id, share) for k in lanes)
            shares[lanes] = choice.shares
            counted[:, lanes] = np.stack([choice.evaluations, choice.tokens, choice.gain])
        metrics = {f"mix_{name}": row for name, row in zip(("evaluations", "tokens", "gain"), counted, strict=True)}
        for number, label in enumerate(layer_labels([layer.name for layer in layers])):
            metrics[f"mix_weight.{label}"] = shares[:, number, 0]
        return values, {name: torch.from_numpy(row).to(ctx.net.device) for name, row in metrics.items()}


@dataclass(frozen=True)
class MixedModel:
    """The client's own LoRA; the received one where it was never sampled."""

    update: MixedStart
    budgeted: bool = False

    @torch.no_grad()
    def __call__(self, ctx: ClientContext) -> Personalised:
        """Leaves it bound."""
        pair, metrics = self.update.pair, dict[str, Tensor]()
        pairs = list(zip(pair.second.names(ctx.net), pair.first.names(ctx.net), strict=True))
        for own, sent in pairs:
            ctx.params[own][ctx.fresh] = ctx.received[sent][ctx.fresh]
        if self.update.cfg.final == "mixed":
            mixing = self.update.memory.mixing(ctx)
            values, metrics = self.update.mixed(ctx, mixing)
            for own, sent in pairs if values else ():
                ctx.params[own][mixing] = values[sent]
        pair.switch(ctx.net, ctx.params, "second")
        ctx.net.place([lane.client.id for lane in ctx.lanes])
        export = partial(pair.second.export, ctx.net, ctx.params, [lane.client.id for lane in ctx.lanes])
        return Personalised(ctx.lanes, ctx.net.logits, metrics=metrics, export=export)


def mixed_method(
    name: str,
    cfg: MixConfig,
    choose: Callable[[ClientContext, Memory, LoraAdapter], Chooser],
    reads: Callable[[int, int], int],
    changes: Changes | None = None,
    **more: Any,
) -> Method:
    """A method of this frame.

    Args:
        name: row of the METHODS table.
        cfg: its configuration.
        choose: makes the chooser of a round from the clients, what they keep, and the adapter of their own LoRA.
        reads: forward passes of a row that it takes at most (a backward pass is one), by the rows of V and its sample.
        changes: which changes its chooser reads; None: none.
        more: further fields of `Method`.
    """
    shared, own = (
        LoraAdapter(cfg.rank, cfg.scale, scope, targets=cfg.targets, prefix=prefix)
        for scope, prefix in ((Scope.SHARED, "global"), (Scope.PRIVATE, "local"))
    )
    pair, memory = AdapterPair(shared, own), Memory(shared, changes, cfg)
    update = MixedStart(cfg, pair, memory, ValidationRows(cfg), lambda ctx: choose(ctx, memory, own))

    def beside(train: int, pool: int, rounds: float) -> float:
        embedded = train + pool if cfg.validation == "global_pool" else train
        return (rounds + (cfg.final == "mixed")) * reads(*cfg.sizes(train, pool)) + embedded

    return Method(
        name=name, adapter=pair, modules=(memory,), local_update=update, personaliser=MixedModel(update),
        aggregator=WeightedMean(), server=ServerSgd(), batch_size=cfg.batch_size, epochs=cfg.epochs,
        steps=cfg.local_steps, validation_pool=cfg.validation == "global_pool", beside=beside, **more,
    )  # fmt: skip
