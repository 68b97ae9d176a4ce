"""The Gaussian mechanism over clients: DP-FedAvg with a fixed denominator.

McMahan et al., "Learning Differentially Private Recurrent Language Models", ICLR 2018, Algorithm 1 (estimator f_f:
the planned, not the actual number of clients divides). Each client's update was clipped where it ran
(`federated.checks`); noise is added once, here, to their sum.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.aggregation.weighted_mean import WeightedSum
from fedtailor.core.messages import Row
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.release import NoisedAggregate, RoundId

MOSTLY_NOISE = "the released update is mostly noise: the noise is longer than the cohort's mean update"


@dataclass(frozen=True)
class GaussianMechanism:
    r""":math:`w + \frac{1}{m}\left(\sum_k \mathrm{clip}_C(w_k - w) + \mathcal{N}(0, (zC)^2 I)\right)`.

    Every client counts once, and m is the planned size of the cohort: a client that fails contributes 0 and changes no
    other client's share. The noise is a function of coordinates, so that runs repeat: **anybody who knows the seed can
    take it away again.** That is right for a simulation and wrong for a deployment, where it must come from a
    cryptographic source.

    Args:
        clip: C, the L2 norm that no update exceeds; infinite only with z = 0.
        noise_multiplier: z, standard deviation of the noise on the sum divided by C.

    >>> total = WeightedSum(np.array([1.0, 2.0]), 2.0)
    >>> plain = GaussianMechanism(1.0, 0.0)(total, np.zeros(2, np.float32), 4, RoundId(1, "base/seed1", 0), 0)
    >>> [float(x) for x in plain.consensus]
    [0.25, 0.5]
    """

    clip: float
    noise_multiplier: float

    def fingerprint(self, total: WeightedSum | None) -> str:
        """Hex sha256 of the sum."""
        data = b"" if total is None else total.total.tobytes() + np.float64(total.weight).tobytes()
        return hashlib.sha256(data).hexdigest()

    def __call__(
        self, total: WeightedSum | None, received: Row, planned: int, round_id: RoundId, draw: int
    ) -> NoisedAggregate:
        """The consensus, computed in float64 and rounded once, after the noise."""
        start = received.astype(np.float64)
        mean, count = (start, 0.0) if total is None else (total.total / total.weight, total.weight)
        # With nobody missing and without noise this is the uniform mean to the last bit.
        exact = mean if count == planned else mean + (count / planned - 1) * (mean - start)
        noise = self.noise(received.size, round_id, draw)
        noisy = exact if noise is None else exact + noise / planned
        metrics, warnings = {"update_norm": float(np.linalg.norm(exact - start))}, list[dict[str, Any]]()
        if noise is not None:
            length, loud = metrics["update_norm"], float(np.linalg.norm(noise / planned))
            metrics |= {"noise_norm": loud} | ({"noise_to_update": loud / length} if length > 0 else {})
            if loud > length:
                warnings.append({"kind": "mostly-noise", "reason": MOSTLY_NOISE})
        return NoisedAggregate(noisy.astype(np.float32), metrics, warnings)

    def noise(self, size: int, round_id: RoundId, draw: int) -> npt.NDArray[np.float64] | None:
        """Noise on the sum, (size,); None for z = 0.

        The stage's path is a coordinate: releases that shared noise could be subtracted from each other.
        """
        if not self.noise_multiplier:
            return None
        rng = numpy_rng(round_id.seed, round_id.path, round_id.round, "dp-noise", draw)
        return rng.standard_normal(size) * (self.noise_multiplier * self.clip)
