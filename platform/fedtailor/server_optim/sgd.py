"""Server SGD, with Flower's and pfl's momentum form: FedAvg and FedAvgM (Hsu et al., 2019)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedtailor.core.messages import Row


@dataclass(frozen=True)
class ServerSgd:
    r""":math:`u \leftarrow \beta u + \Delta,\; w \leftarrow w + \eta u` with :math:`\Delta` = consensus - w.

    Args:
        lr: eta; 1 with beta = 0 is FedAvg.
        momentum: beta.

    >>> fedavg = ServerSgd()
    >>> w = np.zeros(2, np.float32)
    >>> new, state = fedavg.step(w, np.array([1.0, 2.0], np.float32), fedavg.init(w))
    >>> [float(x) for x in new], state
    ([1.0, 2.0], {})
    """

    lr: float = 1.0
    momentum: float = 0.0

    def init(self, params: Row) -> dict[str, Row]:
        """No state without momentum."""
        return {"momentum": np.zeros_like(params)} if self.momentum else {}

    def step(self, params: Row, delta: Row, state: dict[str, Row]) -> tuple[Row, dict[str, Row]]:
        """Moves ``params`` along ``delta``."""
        if not self.momentum:
            return params + np.float32(self.lr) * delta, state
        update = np.float32(self.momentum) * state["momentum"] + delta
        return params + np.float32(self.lr) * update, {"momentum": update}
