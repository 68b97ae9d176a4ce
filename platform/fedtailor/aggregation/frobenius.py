"""HETLoRA's mean: clients' adapters of different ranks, padded with zeros and weighted by what they have learned.

Paper: Cho, Liu, Xu, Fahrezi, Joshi, "Heterogeneous LoRA for Federated Fine-tuning of On-Device Foundation Models",
EMNLP 2024 (arXiv 2401.06432), section 3.2, Eq. 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedtailor.core.messages import Row
from fedtailor.core.scope import ParamSpec

Floats = npt.NDArray[np.float64]


class Factors(NamedTuple):
    """Where a module's A (r, d_in) and B (d_out, r) begin in a row, and their shapes."""

    a: int
    b: int
    a_shape: tuple[int, ...]
    b_shape: tuple[int, ...]


@dataclass(frozen=True)
class CoordinateSum:
    """Sums over clients, (P,) float64 each: w x, w, and x for where all w are 0; and how many clients there are."""

    total: Floats
    weights: Floats
    plain: Floats
    clients: float


@dataclass(frozen=True)
class FrobeniusMean:
    r"""A client's A and B weigh :math:`S_k = \lVert B_k A_k \rVert_F`, whatever else it shares its number of examples.

    Rows have the rank of the server; what a client of a lower rank lacks is 0 in it and takes part as 0 (zero padding,
    without normalising anew). Where all weights are 0, as before any training, clients count once each.

    Args:
        per_module: S_k of every module by itself (Cho et al.); else the root of the sum of squares over all modules.
        modules: A and B in a row, see `laid_out`.
    """

    per_module: bool = False
    modules: tuple[Factors, ...] = ()
    presum: bool = True

    def laid_out(self, specs: Sequence[ParamSpec]) -> FrobeniusMean:
        """The same for rows of these parameters, in flat order; ``x_A.module`` belongs to ``x_B.module``."""
        starts = np.cumsum([0, *(spec.size for spec in specs)]).tolist()
        at = {spec.name: (start, spec.shape) for spec, start in zip(specs, starts, strict=False)}
        pairs = [(name, name.replace("_A.", "_B.", 1)) for name in at if "_A." in name]
        found = [Factors(at[a][0], at[b][0], at[a][1], at[b][1]) for a, b in pairs if b in at]
        return replace(self, modules=tuple(found))

    def zero(self, size: int) -> CoordinateSum:
        """The empty sum."""
        return CoordinateSum(np.zeros(size), np.zeros(size), np.zeros(size), 0.0)

    def add(self, state: CoordinateSum, row: Row, weight: float) -> CoordinateSum:
        """One client more; its examples weigh what is neither A nor B. Reuses the buffers of ``state``."""
        each = self.weights_of(row, weight)
        np.add(state.total, each * row, out=state.total)
        np.add(state.weights, each, out=state.weights)
        np.add(state.plain, row, out=state.plain)
        return replace(state, clients=state.clients + 1.0)

    def weights_of(self, row: Row, examples: float) -> Floats:
        """Weight of each coordinate of a client's row, (P,).

        >>> from fedtailor.core.scope import Scope
        >>> shapes = {"lora_A.q": (1, 2), "lora_B.q": (2, 1), "head": (1,)}
        >>> specs = [ParamSpec(name, shape, Scope.SHARED) for name, shape in shapes.items()]
        >>> FrobeniusMean().laid_out(specs).weights_of(np.array([3, 4, 0, 2, 9], np.float32), 7.0).tolist()
        [10.0, 10.0, 10.0, 10.0, 7.0]
        """
        weights, squares = np.full(row.size, float(examples)), []
        for a, b, a_shape, b_shape in self.modules:
            down = row[a : a + math.prod(a_shape)].reshape(a_shape).astype(np.float64)
            up = row[b : b + math.prod(b_shape)].reshape(b_shape).astype(np.float64)
            # |B A|^2 = tr(B^T B A A^T): the (d_out, d_in) product is never formed.
            squares.append(max(0.0, float(((up.T @ up) * (down @ down.T)).sum())))
        for factors, square in zip(self.modules, squares, strict=True):
            norm = math.sqrt(square if self.per_module else math.fsum(squares))
            for start, shape in ((factors.a, factors.a_shape), (factors.b, factors.b_shape)):
                weights[start : start + math.prod(shape)] = norm
        return weights

    def merge(self, left: CoordinateSum, right: CoordinateSum) -> CoordinateSum:
        """Left, then right."""
        sums = (getattr(left, name) + getattr(right, name) for name in ("total", "weights", "plain", "clients"))
        return CoordinateSum(*sums)

    def result(self, state: CoordinateSum) -> Row:
        """The mean, (P,) float32.

        Raises:
            ZeroDivisionError: no client was added.
        """
        if not state.clients:
            raise ZeroDivisionError("the mean of no clients")
        weighted = np.divide(state.total, state.weights, out=np.zeros_like(state.total), where=state.weights > 0)
        return np.where(state.weights > 0, weighted, state.plain / state.clients).astype(np.float32)

    def weight(self, state: CoordinateSum) -> float:
        """Number of clients."""
        return state.clients
