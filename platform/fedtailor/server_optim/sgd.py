"""Server SGD: FedAvg and FedAvgM (Hsu et al., 2019), with momentum as Flower and pfl have it, or OpenFedLLM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedtailor.core.messages import Row


@dataclass(frozen=True)
class ServerSgd:
    r""":math:`u \leftarrow \beta u + \Delta,\; w \leftarrow w + \eta u` with :math:`\Delta` = consensus - w.

    Args:
        lr: eta; 1 with beta = 0 is FedAvg.
        momentum: beta.
        dampened: u is a mean, beta u + (1 - beta) Delta, as in OpenFedLLM.
        first: what a dampened u is after the first round: ``zero``: decayed from 0; ``delta``: Delta itself.

    >>> fedavg = ServerSgd()
    >>> w = np.zeros(2, np.float32)
    >>> new, state = fedavg.step(w, np.array([1.0, 2.0], np.float32), fedavg.init(w))
    >>> [float(x) for x in new], state
    ([1.0, 2.0], {})
    """

    lr: float = 1.0
    momentum: float = 0.0
    dampened: bool = False
    first: Literal["zero", "delta"] = "zero"

    def init(self, params: Row) -> dict[str, Row]:
        """No state without momentum, nor where it is made of the first delta."""
        return {"momentum": np.zeros_like(params)} if self.momentum and self.first == "zero" else {}

    def step(self, params: Row, delta: Row, state: dict[str, Row]) -> tuple[Row, dict[str, Row]]:
        """Moves ``params`` along ``delta``."""
        if not self.momentum:
            return params + np.float32(self.lr) * delta, state
        if "momentum" not in state:
            update = delta
        else:
            new = np.float32(1 - self.momentum) * delta if self.dampened else delta
            update = np.float32(self.momentum) * state["momentum"] + new
        return params + np.float32(self.lr) * update, {"momentum": update}
