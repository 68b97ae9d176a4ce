"""FedYogi on LoRA: FedAvg whose server takes a step of Yogi.

Paper: Reddi et al., "Adaptive Federated Optimization", ICLR 2021 (arXiv 2003.00295), Algorithm 2; as a baseline in
pFedGPT, see `methods.fedopt` for the switches ``first_moment``, ``second_moment`` and ``weighting``.
    w                      -> SHARED   "lora_*", A and B of every adapted layer
    eta, beta1, beta2, tau -> cfg.server_lr, cfg.beta1, cfg.beta2, cfg.tau
    m, v                   -> the server's state
A round: every client trains w by E epochs of Adam; with the mean change Delta v = v - (1 - beta2) Delta^2 sign(v -
Delta^2); m = beta1 m + (1 - beta1) Delta; w moves by eta m / (sqrt(v) + tau). Unlike Adam's, v forgets at a rate that
does not depend on how much smaller Delta^2 has become.
"""

from __future__ import annotations

from fedtailor.federated.method import Method, MethodEntry
from fedtailor.methods.fedopt import AdaptiveConfig, Decay, adaptive, fedopt


class FedYogiConfig(AdaptiveConfig):
    """Defaults: OpenFedLLM's."""

    beta2: Decay = 0.99


def build(cfg: FedYogiConfig, r_max: int) -> Method:
    """FedYogi."""
    return fedopt("fedyogi", cfg, adaptive("yogi", cfg, cfg.beta2))


ENTRY = MethodEntry(
    name="fedyogi",
    config=FedYogiConfig,
    build=build,
    title="FedYogi",
    summary="FedAvg on LoRA with Yogi on the server (Reddi et al. 2021)",
    tiny={"lr": 5e-3, "batch_size": 4, "epochs": 2, "rank": 3, "server_lr": 0.01, "dropout": 0.2},
)
