"""The values that pFedGPT tries (Shen et al., EMNLP 2025, Figures 2 and 3), and rates of servers that it does not give.

Figure 2 has three rates for pFedGPT and FedIT (FedAvg on LoRA): 5e-5, 1e-4 and, by its caption, 1.5e-4, by the text
1.5e-5; both are here. Figure 3 has the share of the validation pool that a client's mixes are scored on, for both ways
to deal clients (task.dealing). Both are of the loss or score on test rows over all clients, not choices.
The paper's FedAdam, FedYogi and FedAvgM are 6 to 10 points below FedAvg, as if their servers' rate were too large, and
it names none: three rates around OpenFedLLM's default, judged on the train texts of the seen clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tune_spaces.grid import Grid, Space, Value

RATES: Final = (1.5e-5, 5e-5, 1e-4, 1.5e-4)
"""Figure 2: text and caption together."""
SAMPLE_WEIGHTS: Final = (0.125, 0.25, 0.5, 1.0)
"""Figure 3; 1/8 of the pool is one task of eight."""
SERVER_RATES: Final = (1e-4, 1e-3, 1e-2)

_MIXERS: Final = ("pfedgpt", "mix_random", "mix_grid")
_SERVERS: Final = ("fedadagrad", "fedadam", "fedyogi")


def _of(method: str, key: str, values: tuple[Value, ...]) -> Space:
    return {f"{method}.{key}": values}


GRIDS: Final[Mapping[str, Grid]] = {
    **{
        f"{method}_lr": Grid(
            method, _of(method, "lr", RATES), "seen_loss", "Figure 2: loss over rounds; the text has 1.5e-5 for 1.5e-4"
        )
        for method in ("pfedgpt", "fedavg")
    },
    **{
        f"{method}_sample_weight": Grid(
            method,
            _of(method, "sample_weight", SAMPLE_WEIGHTS),
            "seen_loss",
            "Figure 3: share of the pool that mixes are scored on" + (" (a rival, ours)" * (method != "pfedgpt")),
        )
        for method in _MIXERS
    },
    **{
        f"{method}_server": Grid(
            method, _of(method, "server_lr", SERVER_RATES), "train_loss", "no rate of a server is given; ours"
        )
        for method in _SERVERS
    },
}
"""Name of the search to its grid."""

PICKED: Final[Mapping[str, Value]] = {
    "pfedgpt.lr": 1.5e-4,
    "pfedgpt.sample_weight": 1.0,
    **{f"{method}.server_lr": 1e-3 for method in _SERVERS},
}
"""The defaults: FedIT's rate on Dolly, all of the pool for clients dealt by Dirichlet, OpenFedLLM's servers."""
