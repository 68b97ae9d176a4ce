"""Secure aggregation as a simulation: what it costs, what it does to the numbers, what drop-outs do to it.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017 (all pairs), and Bell
et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020 (SecAgg+: k neighbours):
    x_u  -> `FixedPoint.encode(row - received)` times the client's weight, and the weight itself
    PRG(s_uv) -> `stream(..., "secagg-pair")`, added by the smaller id, subtracted by the larger
    PRG(b_u)  -> `stream(..., "secagg-self")`
    R    -> 2^bits
Bytes (CCS 2017, section 7.1): of n clients with m numbers each, one sends and receives 2n a_K + (5n - 4) a_S +
m ceil(log2 R) bits; with k neighbours in the place of n - 1 others it is the count of SecAgg+. Framing, authentication
tags and signatures are not counted.

**It protects nobody.** Clients and server are one program here, masks come from seeds that all of it can compute, keys
and shares are counted, not made. For a deployment use a real protocol, e.g. Flower's SecAgg+.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, log2
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedtailor.aggregation.weighted_mean import WeightedSum
from fedtailor.core.errors import RoundError
from fedtailor.core.messages import Row
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.release import Masked, Opened, RoundId

Vector = npt.NDArray[np.unsignedinteger[Any]]

Bits = Literal[32, 64]


KEY, SHARE = 32, 32
"""Bytes of a public key (X25519) and of a share of a 256-bit secret: a_K = a_S = 256 bits, as in the paper."""


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


def degree(clients: int, neighbours: int | None, complete: bool) -> int:
    """Neighbours of each client: all others (Bonawitz et al.), or an even number of them (Bell et al.).

    Without a number it is 2 ceil(log2 n), the order of growth that Bell et al. prove. Their constants depend on how
    many clients collude and vanish; take them from their Theorem 3.10 for a deployment.

    >>> degree(100, None, False), degree(100, None, True), degree(5, None, False), degree(100, 7, False)
    (14, 99, 4, 8)
    """
    wanted = 2 * ceil(log2(max(clients, 2))) if neighbours is None else neighbours
    even = wanted + wanted % 2
    return clients - 1 if complete or even >= clients - 1 else even


@lru_cache(maxsize=64)
def graph(cohort: tuple[str, ...], degree: int, seed: int, kind: str, round: int) -> Mapping[str, tuple[str, ...]]:
    """Every client's neighbours, symmetric: a ring in random order, each tied to the nearest ones on both sides."""
    count = len(cohort)
    if degree >= count - 1:
        return MappingProxyType({me: tuple(other for other in cohort if other != me) for me in cohort})
    ring = [cohort[i] for i in numpy_rng(seed, kind, round, "secagg-graph").permutation(count)]
    steps = [*range(-degree // 2, 0), *range(1, degree // 2 + 1)]
    return MappingProxyType({me: tuple(ring[(at + s) % count] for s in steps) for at, me in enumerate(ring)})


@dataclass(frozen=True)
class Traffic:
    """Bytes of one client in one round."""

    up: int
    down: int


def traffic(numbers: int, neighbours: int, bits: int, vanished: bool = False) -> Traffic:
    """What one client sends and receives.

    Args:
        numbers: of the masked vector.
        neighbours: k.
        bits: of the modulus R.
        vanished: it is gone once keys and shares are exchanged.

    >>> n, m = 100, 1000
    >>> one = traffic(m, n - 1, 32)
    >>> one.up + one.down == 2 * n * KEY + (5 * n - 4) * SHARE + m * 4
    True
    """
    keys = Traffic(2 * KEY, 2 * neighbours * KEY)
    shares = 2 * neighbours * SHARE
    vector = 0 if vanished else numbers * bits // 8
    unmasking = 0 if vanished else (neighbours + 1) * SHARE
    return Traffic(keys.up + shares + vector + unmasking, keys.down + shares)


@dataclass(frozen=True)
class PairwiseMasking:
    """Masks that cancel in the sum of a cohort.

    Args:
        fixed_point: how updates become whole numbers.
        bits: of the modulus.
        complete: every pair shares a mask (SecAgg), not only neighbours (SecAgg+).
        neighbours: of each client; None: see `degree`.
        threshold: share of a client's neighbours that must answer for its secrets to be recovered: more than this.
        dropout: share of the cohort that vanishes after masking.
        uniform: weigh every client 1.
    """

    fixed_point: FixedPoint
    bits: Bits
    complete: bool
    neighbours: int | None
    threshold: float
    dropout: float
    uniform: bool

    def vanishing(self, round_id: RoundId) -> frozenset[str]:
        """Clients that exchange keys and shares and are never heard of again; methods of a kind lose the same ones."""
        count = round(self.dropout * len(round_id.cohort))
        indices = numpy_rng(round_id.seed, round_id.kind, round_id.round, "secagg-dropout").permutation(
            len(round_id.cohort)
        )[:count]
        return frozenset(round_id.cohort[i] for i in indices)

    def mask(self, row: Row, received: Row, weight: float, client: str, round_id: RoundId) -> Masked:
        """A client's weighted update and its weight, in the ring, under its own mask and one per neighbour."""
        if client in self.vanishing(round_id):
            return Masked(None)
        whole, clamped = self.fixed_point.encode(np.subtract(row, received, dtype=np.float64))
        times = 1 if self.uniform else int(weight)
        vector = to_ring(np.append(whole * times, times), self.bits)
        vector += self._own(client, vector.size, round_id)
        for other in self._graph(round_id)[client]:
            vector += self._towards(client, other, vector.size, round_id)
        return Masked(vector, clamped)

    def open(self, total: Wrapped | None, received: Row, valid: Sequence[str], round_id: RoundId) -> Opened:
        """Removes the survivors' own masks, and the pair masks that the others' absence leaves over.

        Raises:
            RoundError: too few neighbours of a client survive, or the sum may have wrapped.
        """
        self._recoverable(valid, round_id)
        size, alive = received.size + 1, set(valid)
        summed: Vector = np.zeros(size, kind_of(self.bits)) if total is None else total.total.copy()
        for client in valid:
            summed -= self._own(client, size, round_id)
            for other in self._graph(round_id)[client]:
                if other not in alive:
                    summed -= self._towards(client, other, size, round_id)
        numbers = from_ring(summed)
        weight = float(numbers[-1])
        if weight * self.fixed_point.most >= 2.0 ** (self.bits - 1):
            raise RoundError(
                f"{round_id.stage}, round {round_id.round}: "
                f"a sum over the weight {weight:g} may wrap at 2^{self.bits}; set "
                "'privacy.secagg.modulus_bits=64', a larger 'privacy.secagg.step' "
                "or a smaller 'privacy.secagg.range'"
            )
        rows = weight * received.astype(np.float64) + numbers[:-1] * self.fixed_point.step
        return Opened(WeightedSum(rows, weight), self._told(len(valid), size, round_id))

    def _recoverable(self, valid: Sequence[str], round_id: RoundId) -> None:
        alive, links = set(valid), self._graph(round_id)
        for client in round_id.cohort:
            left = sum(other in alive for other in links[client])
            needed = floor(self.threshold * len(links[client])) + 1
            if left < needed:
                raise RoundError(
                    f"{round_id.stage}, round {round_id.round}: "
                    f"the secrets of client {client} cannot be recovered, {left} of "
                    f"its {len(links[client])} neighbours are left and {needed} are needed "
                    f"('privacy.secagg.threshold' = {self.threshold:g}; {len(alive)} of {len(round_id.cohort)} clients)"
                )

    def _told(self, alive: int, numbers: int, round_id: RoundId) -> dict[str, float]:
        total, k = len(round_id.cohort), degree(len(round_id.cohort), self.neighbours, self.complete)
        stayed, gone = traffic(numbers, k, self.bits), traffic(numbers, k, self.bits, vanished=True)
        return {
            "secagg_up_bytes": (stayed.up * alive + gone.up * (total - alive)) / total,
            "secagg_down_bytes": float(stayed.down),
            "secagg_vanished": float(total - alive),
        }

    def _graph(self, round_id: RoundId) -> Mapping[str, tuple[str, ...]]:
        k = degree(len(round_id.cohort), self.neighbours, self.complete)
        return graph(round_id.cohort, k, round_id.seed, round_id.kind, round_id.round)

    def _own(self, client: str, size: int, round_id: RoundId) -> Vector:
        return stream(size, self.bits, round_id.seed, round_id.path, round_id.round, client, "secagg-self")

    def _towards(self, client: str, other: str, size: int, round_id: RoundId) -> Vector:
        low, high = sorted((client, other))
        mask = stream(size, self.bits, round_id.seed, round_id.path, round_id.round, low, high, "secagg-pair")
        return mask if client == low else np.negative(mask)
