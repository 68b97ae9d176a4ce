"""Secure aggregation as a simulation: what it costs, what it does to the numbers, what drop-outs do to it.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017 (all pairs), and Bell
et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020 (SecAgg+: k neighbours):
    x_u  -> `to_fixed_point(row - received)` times the client's weight, and the weight itself
    PRG(s_uv) -> the stream "secagg-pair", added by the smaller id, subtracted by the larger
    PRG(b_u)  -> the stream "secagg-self"
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
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fedtailor.aggregation.weighted_mean import WeightedMean, WeightedSum
from fedtailor.core.errors import RoundError
from fedtailor.core.messages import Row
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.release import Masked, Opened, RoundId
from fedtailor.privacy.config import PrivacyConfig

Vector = npt.NDArray[np.unsignedinteger[Any]]
"""Numbers modulo 2^bits: the type's own overflow is the modulus."""

Bits = Literal[32, 64]
KEY, SHARE = 32, 32
"""Bytes of a public key (X25519) and of a share of a 256-bit secret: a_K = a_S = 256 bits, as in the paper."""


def to_fixed_point(
    update: npt.NDArray[np.float64], step: float, limit: float, toward_zero: bool = False
) -> tuple[npt.NDArray[np.int64], int]:
    """Real numbers as whole multiples of a step, (P,), and how many were cut to the limit.

    Args:
        update: (P,).
        step: distance of two neighbouring values.
        limit: largest absolute value; larger ones are cut.
        toward_zero: cut the remainder, so that no vector gets longer (a clip stays one); else round to nearest.
    """
    scaled = update / step
    whole, most = np.trunc(scaled) if toward_zero else np.rint(scaled), int(limit / step)
    return np.clip(whole, -most, most).astype(np.int64), int(np.count_nonzero(np.abs(whole) > most))


def from_ring(vector: Vector) -> npt.NDArray[np.int64]:
    """The signed numbers nearest to zero.

    >>> [int(x) for x in from_ring(np.array([4294967295, 2], np.uint32))]
    [-1, 2]
    """
    return vector.view(f"int{8 * vector.itemsize}").astype(np.int64)


@dataclass(frozen=True)
class RingSum(WeightedMean):
    """Aggregator of masked vectors: P update numbers and the weight. Only `PairwiseMasking.open` can read its sums,
    whose own weight is the number of vectors."""

    bits: Bits = 64

    def zero(self, size: int) -> WeightedSum:
        """The empty sum for ``size`` parameters, or for a masked vector of ``size`` - 1."""
        return WeightedSum(np.zeros(size + 1, f"uint{self.bits}"), 0.0)

    def add(self, state: WeightedSum, row: Any, weight: float) -> WeightedSum:
        """One client's masked vector more."""
        return WeightedSum(state.total + row, state.weight + 1.0)


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
        return {me: tuple(other for other in cohort if other != me) for me in cohort}
    ring = [cohort[i] for i in numpy_rng(seed, kind, round, "secagg-graph").permutation(count)]
    steps = [*range(-degree // 2, 0), *range(1, degree // 2 + 1)]
    return {me: tuple(ring[(at + s) % count] for s in steps) for at, me in enumerate(ring)}


class Traffic(NamedTuple):
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
    keys, shares = neighbours * KEY, 2 * neighbours * SHARE
    up, down = 2 * KEY + shares, 2 * keys + shares
    return Traffic(up if vanished else up + numbers * bits // 8 + (neighbours + 1) * SHARE, down)


@dataclass(frozen=True)
class PairwiseMasking:
    """Masks that cancel in the sum of a cohort. With ``secagg`` every pair shares one, with ``secagg+`` neighbours do.

    Args:
        cfg: the section ``privacy``.
        uniform: weigh every client 1.
    """

    cfg: PrivacyConfig
    uniform: bool = False

    def vanishing(self, round_id: RoundId) -> frozenset[str]:
        """Clients that exchange keys and shares and are never heard of again; methods of a kind lose the same ones."""
        cohort = round_id.cohort
        rng = numpy_rng(round_id.seed, round_id.kind, round_id.round, "secagg-dropout")
        gone = rng.permutation(len(cohort))[: round(self.cfg.secagg.dropout * len(cohort))]
        return frozenset(cohort[i] for i in gone)

    def mask(self, row: Row, received: Row, weight: float, client: str, round_id: RoundId) -> Masked:
        """A client's weighted update and its weight, in the ring, under its own mask and one per neighbour."""
        if client in self.vanishing(round_id):
            return Masked(None)
        # Rounding to nearest could make a clipped update longer than its clip.
        clipped, secagg = self.cfg.name == "central_dp", self.cfg.secagg
        update = np.subtract(row, received, dtype=np.float64)
        whole, clamped = to_fixed_point(update, secagg.step, secagg.range, toward_zero=clipped)
        times = 1 if self.uniform else int(weight)
        vector = np.append(whole * times, times).astype(f"uint{secagg.modulus_bits}")
        return Masked(vector + self._masks(client, self._graph(round_id)[client], vector.size, round_id), clamped)

    def open(self, total: WeightedSum | None, received: Row, valid: Sequence[str], round_id: RoundId) -> Opened:
        """Removes the survivors' own masks, and the pair masks that the others' absence leaves over.

        Raises:
            RoundError: too few neighbours of a client survive, or the sum may have wrapped.
        """
        secagg, links, alive = self.cfg.secagg, self._graph(round_id), set(valid)
        where, size, bits = f"{round_id.stage}, round {round_id.round}", received.size + 1, secagg.modulus_bits
        self._refuse_unrecoverable(links, alive, where)
        summed: Vector = np.zeros(size, f"uint{bits}") if total is None else total.total.copy()
        for client in valid:
            summed -= self._masks(client, [other for other in links[client] if other not in alive], size, round_id)
        numbers = from_ring(summed)
        weight = float(numbers[-1])
        if weight * int(secagg.range / secagg.step) >= 2.0 ** (bits - 1):
            raise RoundError(
                f"{where}: a sum over the weight {weight:g} may wrap at 2^{bits}; set 'privacy.secagg.modulus_bits=64',"
                " a larger 'privacy.secagg.step' or a smaller 'privacy.secagg.range'"
            )
        rows = weight * received.astype(np.float64) + numbers[:-1] * secagg.step
        cohort, k = len(links), len(next(iter(links.values())))
        stayed, gone = (traffic(size, k, bits, vanished) for vanished in (False, True))
        metrics = {
            "secagg_up_bytes": (stayed.up * len(valid) + gone.up * (cohort - len(valid))) / cohort,
            "secagg_down_bytes": float(stayed.down),
            "secagg_vanished": float(cohort - len(valid)),
        }
        return Opened(WeightedSum(rows, weight), metrics)

    def _refuse_unrecoverable(self, links: Mapping[str, Sequence[str]], alive: set[str], where: str) -> None:
        for client, others in links.items():
            left, needed = sum(other in alive for other in others), floor(self.cfg.secagg.threshold * len(others)) + 1
            if left < needed:
                raise RoundError(
                    f"{where}: the secrets of client {client} cannot be recovered, {left} of its {len(others)} "
                    f"neighbours are left and {needed} are needed ('privacy.secagg.threshold' = "
                    f"{self.cfg.secagg.threshold:g}; {len(alive)} of {len(links)} clients)"
                )

    def _graph(self, round_id: RoundId) -> Mapping[str, tuple[str, ...]]:
        complete = self.cfg.secure_aggregation == "secagg"
        k = degree(len(round_id.cohort), self.cfg.secagg.neighbours, complete)
        return graph(round_id.cohort, k, round_id.seed, round_id.kind, round_id.round)

    def _masks(self, client: str, others: Sequence[str], size: int, round_id: RoundId) -> Vector:
        """A client's own mask and those that it shares with ``others``, of which one adds what the other subtracts."""
        kind = np.dtype(f"uint{self.cfg.secagg.modulus_bits}")

        def stream(*names: str) -> Vector:
            rng = numpy_rng(round_id.seed, round_id.path, round_id.round, *names)
            return rng.integers(0, np.iinfo(kind).max, size, dtype=kind, endpoint=True)

        total = stream(client, "secagg-self")
        for other in others:
            low, high = sorted((client, other))
            mask = stream(low, high, "secagg-pair")
            total += mask if client == low else np.negative(mask)
        return total
