"""Bytes that secure aggregation sends per client, besides the broadcast of the parameters.

Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", CCS 2017, section 7.1: of n
clients with m numbers each, one sends and receives 2n a_K + (5n - 4) a_S + m ceil(log2 R) bits. With k neighbours in
the place of n - 1 others it is the count of SecAgg+ (Bell et al., "Secure Single-Server Aggregation with
(Poly)Logarithmic Overhead", CCS 2020). Framing, authentication tags and signatures are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

KEY, SHARE = 32, 32
"""Bytes of a public key (X25519) and of a share of a 256-bit secret: a_K = a_S = 256 bits, as in the paper."""


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
