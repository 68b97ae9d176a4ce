"""FedAdagrad, FedAdam and FedYogi (Reddi et al., "Adaptive Federated Optimization", ICLR 2021, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fedtailor.core.messages import Row


@dataclass(frozen=True)
class AdaptiveServer:
    r"""Per-coordinate server steps, without bias correction, as in the paper.

    .. math::
        m &= \beta_1 m + (1-\beta_1) \Delta \\
        v &= v + \Delta^2 \;\text{(adagrad)},\quad \beta_2 v + (1-\beta_2) \Delta^2 \;\text{(adam)},\quad
             v - (1-\beta_2) \Delta^2 \,\mathrm{sign}(v - \Delta^2) \;\text{(yogi)} \\
        w &= w + \eta\, m / (\sqrt{v} + \tau)

    Args:
        kind: which v.
        lr: eta.
        beta1, beta2: decay of the moments.
        tau: adaptivity; v starts at tau^2.
        first: what m is after the first round: ``zero``: decayed from 0 like later ones; ``delta``: Delta itself, as in
            OpenFedLLM.
        second: whose squares v is made of: ``delta``, or ``momentum`` (m in the place of Delta), as in OpenFedLLM.

    >>> adam = AdaptiveServer("adam", lr=0.1, beta1=0.0, beta2=0.0, tau=1e-9)
    >>> w = np.zeros(2, np.float32)
    >>> new, _ = adam.step(w, np.array([3.0, -0.01], np.float32), adam.init(w))
    >>> [round(float(x), 4) for x in new]
    [0.1, -0.1]
    """

    kind: Literal["adagrad", "adam", "yogi"]
    lr: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    first: Literal["zero", "delta"] = "zero"
    second: Literal["delta", "momentum"] = "delta"

    def init(self, params: Row) -> dict[str, Row]:
        """M = 0, where it is not made of the first delta; v = tau^2."""
        m = {"m": np.zeros_like(params)} if self.first == "zero" else {}
        return m | {"v": np.full_like(params, self.tau**2)}

    def step(self, params: Row, delta: Row, state: dict[str, Row]) -> tuple[Row, dict[str, Row]]:
        """Moves ``params`` along the scaled first moment."""
        f = np.float32
        m = f(self.beta1) * state["m"] + f(1 - self.beta1) * delta if "m" in state else delta
        square = m * m if self.second == "momentum" else delta * delta
        if self.kind == "adagrad":
            v = state["v"] + square
        elif self.kind == "adam":
            v = f(self.beta2) * state["v"] + f(1 - self.beta2) * square
        else:
            v = state["v"] - f(1 - self.beta2) * square * np.sign(state["v"] - square)
        moved = params + f(self.lr) * m / (np.sqrt(v) + f(self.tau))
        return np.asarray(moved, np.float32), {"m": np.asarray(m, np.float32), "v": np.asarray(v, np.float32)}
