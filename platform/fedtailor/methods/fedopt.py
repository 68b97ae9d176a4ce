"""What FedAvgM, FedAdagrad, FedAdam and FedYogi have in common: FedAvg's clients, a server that takes steps of its own.

Paper: Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan, "Adaptive Federated Optimization", ICLR 2021
(arXiv 2003.00295), Algorithms 1 and 2. As baselines in pFedGPT (Shen et al., EMNLP 2025), which gives neither rates nor
decays of its servers: the defaults are those of OpenFedLLM (Ye et al., KDD 2024), on which such comparisons are run.
There Algorithm 2 is changed in three points, each a switch here: the first moment after the first round is the first
delta and not decayed from 0; the second moment is made of the first one's squares and not of the delta's; and adaptive
servers count every client once instead of by its examples.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.settings import Rate
from fedtailor.federated.method import Method, ServerOptimizer
from fedtailor.server_optim.adaptive import AdaptiveServer
from fedtailor.training.epoch_lora import EpochLoraConfig, LocalEpochs, ReceivedModel

Decay = Annotated[float, Field(ge=0, lt=1)]


class FedOptConfig(EpochLoraConfig):
    """Clients as in pFedGPT's tables; servers as in OpenFedLLM."""

    server_lr: Rate = 1e-3
    """eta. pFedGPT names none; 1e-4, 1e-3 and 1e-2 are worth trying."""
    first_moment: Literal["zero", "delta"] = "delta"
    """What the first moment is after the first round: decayed from 0 like later ones (Algorithm 2), or the delta."""
    weighting: Literal["examples", "uniform"] = "uniform"
    """What a client weighs in the mean: its training examples, or as much as every other."""


class AdaptiveConfig(FedOptConfig):
    """Servers with a rate per coordinate."""

    beta1: Decay = 0.9
    tau: Rate = 1e-3
    """Adaptivity; v starts at tau^2."""
    second_moment: Literal["delta", "momentum"] = "momentum"
    """Whose squares v is made of: the delta's (Algorithm 2), or the first moment's."""


def adaptive(kind: Literal["adagrad", "adam", "yogi"], cfg: AdaptiveConfig, beta2: float = 0.0) -> AdaptiveServer:
    """The server of a configuration; ``beta2``: decay of v, which Adagrad's has not."""
    return AdaptiveServer(kind, cfg.server_lr, cfg.beta1, beta2, cfg.tau, cfg.first_moment, cfg.second_moment)


def fedopt(name: str, cfg: FedOptConfig, server: ServerOptimizer) -> Method:
    """FedAvg on LoRA with another server."""
    adapter = cfg.adapter()
    return Method(
        name=name,
        adapter=adapter,
        local_update=LocalEpochs(cfg, adapter),
        personaliser=ReceivedModel(adapter),
        aggregator=WeightedMean(uniform=cfg.weighting == "uniform"),
        server=server,
        batch_size=cfg.batch_size,
        epochs=cfg.epochs,
        steps=cfg.local_steps,
    )
