"""PerFIT's mean: every parameter over the clients that kept it, whatever the others pruned.

Paper: Zhang, Zhou, Hu, et al., "Personalized Federated Instruction Tuning via Neural Architecture Search" (arXiv
2402.16919): clients send the parameters that their masks keep, and each is averaged over those who do. What becomes of
one that nobody in a cohort keeps is ours, see `OwnedStep`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedtailor.core.messages import Row

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class OwnedSum:
    """Sums over clients, (P,) float64 each: w x, and w where x is not 0; and how many clients there are."""

    total: Floats
    weights: Floats
    clients: float


@dataclass(frozen=True)
class OwnersMean:
    """A client weighs its number of examples where its row is not 0, and nothing where it is: there it has pruned.

    A parameter that is kept and 0 all the same counts as pruned. Rows without any 0 are averaged as by `WeightedMean`,
    to the last bit.

    >>> mean = OwnersMean()
    >>> state = mean.add(mean.zero(3), np.array([1, 2, 0], np.float32), 3.0)
    >>> mean.result(mean.add(state, np.array([5, 0, 0], np.float32), 1.0)).tolist()
    [2.0, 2.0, 0.0]
    """

    presum: bool = True

    def zero(self, size: int) -> OwnedSum:
        """The empty sum."""
        return OwnedSum(np.zeros(size), np.zeros(size), 0.0)

    def add(self, state: OwnedSum, row: Row, weight: float) -> OwnedSum:
        """One client more. Reuses the buffers of ``state``, which must not be used again."""
        np.add(state.total, np.multiply(row, weight, dtype=np.float64), out=state.total)
        np.add(state.weights, np.multiply(row != 0, weight, dtype=np.float64), out=state.weights)
        return OwnedSum(state.total, state.weights, state.clients + 1.0)

    def merge(self, left: OwnedSum, right: OwnedSum) -> OwnedSum:
        """Left, then right."""
        return OwnedSum(left.total + right.total, left.weights + right.weights, left.clients + right.clients)

    def result(self, state: OwnedSum) -> Row:
        """The mean, (P,) float32, and 0 where nobody kept a parameter.

        Raises:
            ZeroDivisionError: no client was added.
        """
        if not state.clients:
            raise ZeroDivisionError("the mean of no clients")
        owned = state.weights > 0
        return np.divide(state.total, state.weights, out=np.zeros_like(state.total), where=owned).astype(np.float32)

    def weight(self, state: OwnedSum) -> float:
        """Number of clients."""
        return state.clients


@dataclass(frozen=True)
class OwnedStep:
    """A server optimizer: the parameters that a cohort kept become their mean, and the others stay as they are.

    One that no cohort has kept so far is 0, as it is for all who pruned it: nobody's training is in its initial value,
    and a new client, which has no mask, would compute with it.
    """

    def init(self, params: Row) -> dict[str, Row]:
        """Nothing has been kept."""
        return {"owned": np.zeros_like(params)}

    def step(self, params: Row, delta: Row, state: dict[str, Row]) -> tuple[Row, dict[str, Row]]:
        """Takes a consensus of 0, a delta of exactly minus what there is, for one of nobody."""
        kept = delta != -params
        owned = np.maximum(state["owned"], kept.astype(np.float32))
        return np.where(kept, params + delta, params * owned), {"owned": owned}
