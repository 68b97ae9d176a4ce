"""FedAdagrad on LoRA: FedAvg whose server takes a step of Adagrad.

Paper: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), Algorithm 2; as a baseline in
pFedGPT, see `methods.fedopt` for the switches ``first_moment``, ``second_moment`` and ``weighting``.
    w        -> SHARED   "lora_*", A and B of every adapted layer
    eta, tau -> cfg.server_lr, cfg.tau
    m, v     -> the server's state
A round: every client trains w by E epochs of Adam; with the mean change Delta v = v + Delta^2; w moves by eta Delta /
(sqrt(v) + tau), without momentum, as in the paper's experiments (beta1 = 0).
"""

from __future__ import annotations

from fedtailor.federated.method import Method, MethodEntry
from fedtailor.methods.fedopt import AdaptiveConfig, Decay, adaptive, fedopt


class FedAdagradConfig(AdaptiveConfig):
    """Defaults: OpenFedLLM's."""

    beta1: Decay = 0.0


def build(cfg: FedAdagradConfig, r_max: int) -> Method:
    """FedAdagrad."""
    return fedopt("fedadagrad", cfg, adaptive("adagrad", cfg))


ENTRY = MethodEntry(
    name="fedadagrad",
    config=FedAdagradConfig,
    build=build,
    title="FedAdagrad",
    summary="FedAvg on LoRA with Adagrad on the server (Reddi et al. 2021)",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "server_lr": 0.01, "dropout": 0.2},
)
