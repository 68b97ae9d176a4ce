"""Numbers modulo 2^32 or 2^64: fixed-point updates, masks, and sums that wrap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedtailor.core.release import Row
from fedtailor.core.seeding import numpy_rng

Vector = npt.NDArray[np.unsignedinteger[Any]]
Bits = Literal[32, 64]


def kind_of(bits: Bits) -> Any:
    """The unsigned type whose own overflow is the modulus."""
    return np.uint32 if bits == 32 else np.uint64


@dataclass(frozen=True)
class FixedPoint:
    """Real numbers as whole multiples of a step.

    Args:
        step: distance of two neighbouring values.
        limit: largest absolute value; larger ones are cut.
        toward_zero: cut the remainder, so that no vector gets longer (a clip stays one); else round to nearest.
    """

    step: float
    limit: float
    toward_zero: bool = False

    def encode(self, update: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.int64], int]:
        """Whole numbers (P,), and how many were cut to the limit."""
        scaled = update / self.step
        whole = np.trunc(scaled) if self.toward_zero else np.rint(scaled)
        most = self.most
        return np.clip(whole, -most, most).astype(np.int64), int(np.count_nonzero(np.abs(whole) > most))

    @property
    def most(self) -> int:
        """Largest whole number."""
        return int(self.limit / self.step)


def to_ring(numbers: npt.NDArray[np.int64], bits: Bits) -> Vector:
    """Signed whole numbers modulo 2^bits.

    >>> [int(x) for x in to_ring(np.array([-1, 2]), 32)]
    [4294967295, 2]
    """
    return np.asarray(numbers.astype(kind_of(bits)))


def from_ring(vector: Vector) -> npt.NDArray[np.int64]:
    """The signed numbers nearest to zero.

    >>> [int(x) for x in from_ring(np.array([4294967295, 2], np.uint32))]
    [-1, 2]
    """
    return vector.view(np.int32 if vector.dtype == np.uint32 else np.int64).astype(np.int64)


def stream(size: int, bits: Bits, *coordinates: int | str) -> Vector:
    """A mask: uniform numbers of the ring, from coordinates that two clients (or client and server) share."""
    kind = kind_of(bits)
    return numpy_rng(*coordinates).integers(0, np.iinfo(kind).max, size, dtype=kind, endpoint=True)


@dataclass(frozen=True)
class Wrapped:
    """A sum of masked vectors (P + 1,) and how many there are."""

    total: Vector
    count: float

    def merged(self, other: Wrapped) -> Wrapped:
        """Both sums."""
        return Wrapped(self.total + other.total, self.count + other.count)


@dataclass(frozen=True)
class RingSum:
    """Aggregator of masked vectors: P update numbers and the weight. Only `Masking.open` can read its sums."""

    bits: Bits
    presum: bool = True

    def zero(self, size: int) -> Wrapped:
        """The empty sum for ``size`` parameters, or for a masked vector of ``size`` - 1."""
        return Wrapped(np.zeros(size + 1, kind_of(self.bits)), 0.0)

    def add(self, state: Wrapped, row: Any, weight: float) -> Wrapped:
        """One client's masked vector more."""
        return Wrapped(state.total + row, state.count + 1.0)

    def merge(self, left: Wrapped, right: Wrapped) -> Wrapped:
        """Left, then right."""
        return left.merged(right)

    def result(self, state: Any) -> Row:
        """The mean of an *opened* sum: a `WeightedSum`."""
        return np.asarray(state.total / state.weight, np.float32)

    def weight(self, state: Wrapped) -> float:
        """Vectors in the sum: their weights are masked."""
        return state.count
