"""FedAvg: local training, then the mean of the clients' parameters weighted by examples.

Paper: McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
FedP2EFT (section 4.1.2, "Standard FL") trains its base models this way, with full fine-tuning or with LoRA.
    w    -> SHARED   every weight (adapter=full) or A and B (adapter=lora)
    E, B -> cfg.epochs, cfg.batch_size
Deviation of the FedP2EFT reference: weights in bfloat16 without float32 masters, so that many cannot move at a
learning rate of 5e-5; ``weights=bfloat16`` emulates it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field

from fedtailor.adapters.full import FullModel
from fedtailor.adapters.lora import LoraAdapter, Targets
from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.core.scope import Scope
from fedtailor.core.settings import Positive, Rate
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report, ServerOptimizer
from fedtailor.lanes.adam import AdamGroup
from fedtailor.lanes.batches import Examples
from fedtailor.server_optim.adaptive import AdaptiveServer
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.task import TASKS
from fedtailor.training.finetune import NoPersonalisation
from fedtailor.training.local import Training, train


class FedAvgConfig(Config):
    """Defaults: FedP2EFT A.3 (mBERT on XNLI and MasakhaNEWS)."""

    when_absent: ClassVar[Mapping[str, Any]] = {"embeddings": True, "train_on_inputs": False}

    adapter: Literal["full", "lora"] = "full"
    embeddings: bool = True
    """adapter=full: whether embedding tables are trained, too. They may be half of a model, of which a client's texts
    touch little, and yet each step updates and each round sends all of them."""
    lr: Rate = 5e-5
    lr_final: Rate | None = None
    """Cosine decay from lr to this value over the rounds (FedP2EFT's Fed-Aya base: 2e-5 to 1e-6); None: constant."""
    epochs: Positive = 2
    steps: Positive | None = None
    """Exactly so many local steps in the place of epochs (Fed-Aya's base: 10, by FedLLM-Bench's recipe)."""
    batch_size: Positive = 32
    max_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """The reference clips at 1.0 (its trainer's default); the paper mentions none."""
    rank: Positive = 8
    """adapter=lora only, as are the four below."""
    scale: Rate = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Targets = "all-linear"
    """Layers that get a LoRA: all, ``body``, ``head``, or e.g. ``[query, value]``."""
    head: bool = False
    """Whether the classification head trains too, as peft's SEQ_CLS does."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 rounds the trained weights after every step, as the reference's missing master copies do."""
    train_on_inputs: bool = False
    """Tasks that ask for text: clients learn whole texts, prompts included (FedIT), instead of responses alone. Models
    are scored by responses either way."""
    server: Literal["sgd", "adagrad", "adam", "yogi"] = "sgd"
    """sgd with server_lr 1 is FedAvg; the others are FedOpt's (Reddi et al., 2021)."""
    server_lr: Rate = 1.0
    server_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """sgd: FedAvgM (Hsu et al., 2019). Adaptive servers: beta 1."""
    server_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.99
    server_tau: Rate = 1e-3

    @classmethod
    def for_task(cls, given: Mapping[str, Any], task: TaskConfig) -> Mapping[str, Any]:
        """Only tasks that ask for text have inputs to learn."""
        entry = TASKS.get(task.name)
        if given.get("train_on_inputs") and entry and entry.kind != "generation":
            raise ValueError(
                f"'fedavg.train_on_inputs' = true: task '{task.name}' ({entry.kind}) has no prompts to be learned "
                "with responses (allowed: false)"
            )
        return given


@dataclass(frozen=True)
class LocalSgd:
    """E epochs of Adam on everything SHARED."""

    cfg: FedAvgConfig

    def __call__(self, ctx: ClientContext) -> Report:
        """Trains the received parameters on the client's data."""
        cfg, full = self.cfg, self.cfg.adapter == "full"
        if cfg.train_on_inputs:
            ctx = ctx.with_lanes([replace(lane, train=without_prompts(lane.train)) for lane in ctx.lanes])
        how = Training(
            cfg.epochs, cfg.batch_size, "train", cfg.max_grad_norm,
            dropout=0.0 if full else cfg.dropout, own_dropout=full, steps=cfg.steps,
        )  # fmt: skip
        rounded = torch.bfloat16 if cfg.weights == "bfloat16" else None
        names = tuple(spec.name for spec in ctx.params.specs)
        trace = train(ctx, [AdamGroup(names, rate(cfg, ctx.round, ctx.rounds), rounded=rounded)], how)
        return Report({"train_loss": trace.loss})


def without_prompts(texts: Examples) -> Examples:
    """The same instructions as responses from their second token on: there is nothing to predict the first one from."""
    return replace(texts, prompt_length=np.ones_like(texts.lengths))


def rate(cfg: FedAvgConfig, round: int, rounds: int) -> float:
    """Learning rate of a round: lr in the first, lr_final in the last, a half cosine between.

    >>> [f"{rate(FedAvgConfig(lr=1.0, lr_final=0.5), r, 3):.2f}" for r in range(3)]
    ['1.00', '0.75', '0.50']
    """
    if cfg.lr_final is None:
        return cfg.lr
    progress = round / max(1, rounds - 1)
    return cfg.lr_final + (cfg.lr - cfg.lr_final) * (1 + math.cos(math.pi * progress)) / 2


def build(cfg: FedAvgConfig, r_max: int) -> Method:
    """FedAvg on all weights or on LoRA."""
    return Method(
        name="fedavg",
        adapter=FullModel(embeddings=cfg.embeddings) if cfg.adapter == "full" else _lora(cfg),
        local_update=LocalSgd(cfg),
        personaliser=NoPersonalisation(),
        aggregator=WeightedMean(),
        server=_server(cfg),
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        steps=cfg.steps,
    )


def _lora(cfg: FedAvgConfig) -> LoraAdapter:
    return LoraAdapter(cfg.rank, cfg.scale, Scope.SHARED, targets=cfg.targets, head=cfg.head)


def _server(cfg: FedAvgConfig) -> ServerOptimizer:
    if cfg.server == "sgd":
        return ServerSgd(cfg.server_lr, cfg.server_momentum)
    return AdaptiveServer(cfg.server, cfg.server_lr, cfg.server_momentum, cfg.server_beta2, cfg.server_tau)


ENTRY = MethodEntry(
    name="fedavg",
    config=FedAvgConfig,
    build=build,
    title="FedAvg",
    summary="FedAvg, full fine-tuning or LoRA (McMahan et al. 2017)",
    base=True,
    tiny={
        "lr": 5e-3,
        "batch_size": 4,
        "epochs": 2,
        "adapter": "lora",
        "rank": 3,
        "dropout": 0.2,
        "max_grad_norm": 0.1,
    },
)
