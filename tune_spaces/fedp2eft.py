"""The grids of FedP2EFT (Lee et al., arXiv 2502.04387, appendix A.4), as dotted keys of the configuration.

The paper searches each method alone, on XNLI with mBERT and on Fed-Aya with MobileLLaMA, and takes what it
finds to MasakhaNEWS and Llama 3. What it picked is the default of the configuration, see `PICKED`. For FedAvg
(A.3) it names one learning rate and no grid.

What decides: of LoRA it says "the best performance on the train set", of AdaLoRA "similarly to LoRA", of FedL2P and
FedP2EFT only "the best". Here all of them are judged alike, on the train texts of the seen clients. At which budget r
the paper searched it does not say.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tune_spaces.grid import Grid, Space, Value

LORA: Final[Space] = {
    "lora.lr": (1e-5, 1e-4, 1e-3),
    "lora.epochs": (1, 2, 3),
}
"""A.4, "LoRA PEFT": 9 trials, judged on the train set. The two epochs found are used for every method."""

ADALORA: Final[Space] = {
    "adalora.lr": (1e-5, 1e-4, 1e-3, 1e-2),
    "adalora.delta_t": (1, 10, 100),
    "adalora.orth": (0.1, 0.5),
}
"""A.4, "AdaLoRA": 24 trials."""

LAMBDA_LR: Final[tuple[float, ...]] = (1e-1, 1e-2, 1e-3, 1e-4)
"""A.4, "FedP2EFT": learning rate of lambda. A and B keep the rate found for LoRA."""

BAYESTUNE_LORA: Final[Space] = {"bayestune_lora.search.lambda_lr": LAMBDA_LR}
"""A.4, "BayesTune-LoRA": the paper takes over FedP2EFT's rate without a search of its own; this is the same
grid, for whoever wants to give the baseline one."""

FEDL2P: Final[Space] = {
    "fedl2p.lrnet.lr": (1e-5, 1e-4, 1e-3),
    "fedl2p.lrnet.multiplier_lr": (1e-4, 1e-5, 1e-6),
}
"""A.4, "FedL2P": 9 trials."""

FEDP2EFT: Final[Space] = {"fedp2eft.stage1.lambda_lr": LAMBDA_LR}
"""A.4, "FedP2EFT": 4 trials."""

_TRAIN: Final = "train_accuracy"

GRIDS: Final[Mapping[str, Grid]] = {
    "lora": Grid("lora", LORA, _TRAIN, 'A.4: "the best performance on the train set"'),
    "adalora": Grid("adalora", ADALORA, _TRAIN, 'A.4: "similarly to LoRA"'),
    "bayestune_lora": Grid("bayestune_lora", BAYESTUNE_LORA, _TRAIN, "no search: A.4 takes over FedP2EFT's rate"),
    "fedl2p": Grid("fedl2p", FEDL2P, _TRAIN, "A.4 does not say what decided; judged as LoRA"),
    "lambda_lr": Grid("fedp2eft", FEDP2EFT, _TRAIN, "A.4 does not say what decided; judged as LoRA"),
}
"""Name of the search to its grid."""

PICKED: Final[Mapping[str, Value]] = {
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
