"""FedAvgM on LoRA: FedAvg whose server keeps momentum.

Paper: Hsu, Qi, Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
2019 (arXiv 1909.06335), section 4; as a baseline in pFedGPT, see `methods.fedopt`.
    w          -> SHARED   "lora_*", A and B of every adapted layer
    beta, eta  -> cfg.momentum, cfg.server_lr
    v          -> the server's state
A round: every client trains w by E epochs of Adam; v = beta v + (1 - beta) Delta with the mean change Delta; w moves by
eta v. With beta = 0 and eta = 1 it is FedAvg. Hsu et al. have v = beta v + Delta (``dampened=false``).
"""

from __future__ import annotations

from typing import Literal

from fedtailor.core.settings import Rate
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.methods.fedopt import Decay, FedOptConfig, fedopt
from fedtailor.server_optim.sgd import ServerSgd


class FedAvgMConfig(FedOptConfig):
    """Defaults: OpenFedLLM's."""

    server_lr: Rate = 1.0
    momentum: Decay = 0.9
    """FedLLM-Bench: 0.5."""
    dampened: bool = True
    """Whether the momentum is a mean of the changes instead of their sum."""
    weighting: Literal["examples", "uniform"] = "examples"


def build(cfg: FedAvgMConfig, r_max: int) -> Method:
    """FedAvgM."""
    return fedopt("fedavgm", cfg, ServerSgd(cfg.server_lr, cfg.momentum, cfg.dampened, cfg.first_moment))


ENTRY = MethodEntry(
    name="fedavgm",
    config=FedAvgMConfig,
    build=build,
    title="FedAvgM",
    summary="FedAvg on LoRA with momentum on the server (Hsu et al. 2019)",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "momentum": 0.5, "dropout": 0.2},
)
