"""Secure aggregation as a simulation: what it costs, what it does to the numbers, what drop-outs do to it.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017 (all pairs), and Bell
et al., "Secure Single-Server Aggregation with (Poly)Logarithmic Overhead", CCS 2020 (SecAgg+: k neighbours):
    x_u  -> `FixedPoint.encode(row - received)` times the client's weight, and the weight itself
    PRG(s_uv) -> `stream(..., "secagg-pair")`, added by the smaller id, subtracted by the larger
    PRG(b_u)  -> `stream(..., "secagg-self")`
    R    -> 2^bits

**It protects nobody.** Clients and server are one program here, masks come from seeds that all of it can compute, keys
and shares are counted, not made. For a deployment use a real protocol, e.g. Flower's SecAgg+.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from fedtailor.aggregation.weighted_mean import WeightedSum
from fedtailor.core.errors import RoundError
from fedtailor.core.release import Masked, Opened, Row, Site
from fedtailor.core.seeding import numpy_rng
from fedtailor.privacy.neighbours import degree, graph
from fedtailor.privacy.ring import Bits, FixedPoint, Vector, Wrapped, from_ring, kind_of, stream, to_ring
from fedtailor.privacy.traffic import traffic


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

    def vanishing(self, site: Site) -> frozenset[str]:
        """Clients that exchange keys and shares and are never heard of again; methods of a kind lose the same ones."""
        count = round(self.dropout * len(site.cohort))
        picks = numpy_rng(site.seed, site.kind, site.round, "secagg-dropout").permutation(len(site.cohort))[:count]
        return frozenset(site.cohort[i] for i in picks)

    def mask(self, row: Row, received: Row, weight: float, client: str, site: Site) -> Masked:
        """A client's weighted update and its weight, in the ring, under its own mask and one per neighbour."""
        if client in self.vanishing(site):
            return Masked(None)
        whole, clamped = self.fixed_point.encode(np.subtract(row, received, dtype=np.float64))
        times = 1 if self.uniform else int(weight)
        vector = to_ring(np.append(whole * times, times), self.bits)
        vector += self._own(client, vector.size, site)
        for other in self._graph(site)[client]:
            vector += self._towards(client, other, vector.size, site)
        return Masked(vector, clamped)

    def open(self, total: Wrapped | None, received: Row, valid: Sequence[str], site: Site) -> Opened:
        """Removes the survivors' own masks, and the pair masks that the others' absence leaves over.

        Raises:
            RoundError: too few neighbours of a client survive, or the sum may have wrapped.
        """
        self._recoverable(valid, site)
        size, alive = received.size + 1, set(valid)
        summed: Vector = np.zeros(size, kind_of(self.bits)) if total is None else total.total.copy()
        for client in valid:
            summed -= self._own(client, size, site)
            for other in self._graph(site)[client]:
                if other not in alive:
                    summed -= self._towards(client, other, size, site)
        numbers = from_ring(summed)
        weight = float(numbers[-1])
        if weight * self.fixed_point.most >= 2.0 ** (self.bits - 1):
            raise RoundError(
                f"{site.stage}, round {site.round}: a sum over the weight {weight:g} may wrap at 2^{self.bits}; set "
                "'privacy.secagg.modulus_bits=64', a larger 'privacy.secagg.step' "
                "or a smaller 'privacy.secagg.range'"
            )
        rows = weight * received.astype(np.float64) + numbers[:-1] * self.fixed_point.step
        return Opened(WeightedSum(rows, weight), self._told(len(valid), size, site))

    def _recoverable(self, valid: Sequence[str], site: Site) -> None:
        alive, links = set(valid), self._graph(site)
        for client in site.cohort:
            left = sum(other in alive for other in links[client])
            needed = floor(self.threshold * len(links[client])) + 1
            if left < needed:
                raise RoundError(
                    f"{site.stage}, round {site.round}: the secrets of client {client} cannot be recovered, {left} of "
                    f"its {len(links[client])} neighbours are left and {needed} are needed "
                    f"('privacy.secagg.threshold' = {self.threshold:g}; {len(alive)} of {len(site.cohort)} clients)"
                )

    def _told(self, alive: int, numbers: int, site: Site) -> dict[str, float]:
        total, k = len(site.cohort), degree(len(site.cohort), self.neighbours, self.complete)
        stayed, gone = traffic(numbers, k, self.bits), traffic(numbers, k, self.bits, vanished=True)
        return {
            "secagg_up_bytes": (stayed.up * alive + gone.up * (total - alive)) / total,
            "secagg_down_bytes": float(stayed.down),
            "secagg_vanished": float(total - alive),
        }

    def _graph(self, site: Site) -> Mapping[str, tuple[str, ...]]:
        k = degree(len(site.cohort), self.neighbours, self.complete)
        return graph(site.cohort, k, site.seed, site.kind, site.round)

    def _own(self, client: str, size: int, site: Site) -> Vector:
        return stream(size, self.bits, site.seed, site.path, site.round, client, "secagg-self")

    def _towards(self, client: str, other: str, size: int, site: Site) -> Vector:
        low, high = sorted((client, other))
        mask = stream(size, self.bits, site.seed, site.path, site.round, low, high, "secagg-pair")
        return mask if client == low else np.negative(mask)
