"""The grids of FedP2EFT (Lee et al., arXiv 2502.04387, appendix A.4), as dotted keys of the configuration.

The paper searches each method alone, on XNLI with mBERT and on Fed-Aya with MobileLLaMA, and takes what it
finds to MasakhaNEWS and Llama 3. What it picked is the default of the configuration, see `PICKED`. For FedAvg
(A.3) it names one learning rate and no grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

Grid = Mapping[str, tuple[int | float, ...]]
"""Dotted key to the values that were tried; the trials are all combinations."""

LORA: Final[Grid] = {
    "lora.lr": (1e-5, 1e-4, 1e-3),
    "lora.epochs": (1, 2, 3),
}
"""A.4, "LoRA PEFT": 9 trials, judged on the train set. The two epochs found are used for every method."""

ADALORA: Final[Grid] = {
    "adalora.lr": (1e-5, 1e-4, 1e-3, 1e-2),
    "adalora.delta_t": (1, 10, 100),
    "adalora.orth": (0.1, 0.5),
}
"""A.4, "AdaLoRA": 24 trials."""

LAMBDA_LR: Final[tuple[float, ...]] = (1e-1, 1e-2, 1e-3, 1e-4)
"""A.4, "FedP2EFT": learning rate of lambda. A and B keep the rate found for LoRA."""

BAYESTUNE_LORA: Final[Grid] = {"bayestune_lora.search.lambda_lr": LAMBDA_LR}
"""A.4, "BayesTune-LoRA": the paper takes over FedP2EFT's rate without a search of its own; this is the same
grid, for whoever wants to give the baseline one."""

FEDL2P: Final[Grid] = {
    "fedl2p.lrnet.lr": (1e-5, 1e-4, 1e-3),
    "fedl2p.lrnet.multiplier_lr": (1e-4, 1e-5, 1e-6),
}
"""A.4, "FedL2P": 9 trials."""

FEDP2EFT: Final[Grid] = {"fedp2eft.stage1.lambda_lr": LAMBDA_LR}
"""A.4, "FedP2EFT": 4 trials."""

GRIDS: Final[Mapping[str, Grid]] = {
    "lora": LORA,
    "adalora": ADALORA,
    "bayestune_lora": BAYESTUNE_LORA,
    "fedl2p": FEDL2P,
    "fedp2eft": FEDP2EFT,
}
"""Row of the METHODS table to its grid."""

PICKED: Final[Mapping[str, int | float]] = {
    "lora.lr": 1e-4,
    "lora.epochs": 2,
    "adalora.lr": 1e-3,
    "adalora.delta_t": 1,
    "adalora.orth": 0.1,
    "bayestune_lora.search.lambda_lr": 1e-2,
    "fedl2p.lrnet.lr": 1e-4,
    "fedl2p.lrnet.multiplier_lr": 1e-6,
    "fedp2eft.stage1.lambda_lr": 1e-2,
}
"""What the paper picked for all of its experiments (A.4)."""
