"""The configuration section ``privacy``. What it does is in `fedtailor.privacy`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from fedtailor.core.config import Config
from fedtailor.core.settings import Named, Rate


class SecAggConfig(Config):
    """How secure aggregation is simulated; used where ``privacy.secure_aggregation`` is not ``none``."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the cohort that vanishes after masking, drawn anew each round."""
    threshold: Annotated[float, Field(ge=0.5, lt=1)] = 0.5
    """More than this share of a client's neighbours must be left, or its secrets are lost and the round fails."""
    neighbours: Annotated[int, Field(ge=2)] | None = None
    """secagg+: clients that each client shares masks with (rounded up to even); default 2 ceil(log2 cohort)."""
    step: Annotated[float, Field(gt=0, le=1)] = 2.0**-20
    """Distance of two neighbouring values of the fixed-point numbers that updates become."""
    range: Rate = 8.0
    """Largest absolute value of one number of an update; larger ones are cut, and reported."""
    modulus_bits: Literal[32, 64] = 64
    """Of the ring; 32 sends half as much, and must hold cohort weight * range / step."""

    @model_validator(mode="after")
    def _fits(self) -> SecAggConfig:
        if self.range / self.step >= 2 ** (self.modulus_bits - 1):
            raise ValueError(
                f"'privacy.secagg.range' / 'privacy.secagg.step' = {self.range / self.step:g} does not fit into "
                f"'privacy.secagg.modulus_bits' = {self.modulus_bits} with a sign"
            )
        return self


class PrivacyConfig(Named):
    """What is done to hide single clients; every stage with rounds. See `fedtailor.privacy`."""

    name: Literal["none", "central_dp"] = "none"
    """``central_dp``: every client's update is clipped, counts once, and noise is added to the sum (DP-FedAvg)."""
    clip: Rate | None = None
    """Largest L2 norm of a client's update; needed wherever there is noise."""
    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise on the sum, divided by ``clip``."""
    target_epsilon: Rate | None = None
    """In the place of ``noise_multiplier``: the smallest one with which base and strategy of any one method of the
    run cost at most this epsilon."""
    delta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Default: N^-1.1 for N clients in the seen pool."""
    sampler: Literal["fixed", "poisson"] = "fixed"
    """``fixed``: cohorts of one size; epsilon is for one client *replaced*. ``poisson``: every client by itself, the
    cohort size is the expected one; epsilon is for one client *added or removed*, as most papers report it."""
    secure_aggregation: Literal["none", "secagg", "secagg+"] = "none"
    """Simulated: costs, fixed-point numbers and drop-outs of the protocol. It protects nobody."""
    secagg: SecAggConfig = SecAggConfig()

    @model_validator(mode="after")
    def _consistent(self) -> PrivacyConfig:
        used = {"clip": self.clip, "noise_multiplier": self.noise_multiplier, "target_epsilon": self.target_epsilon,
                "delta": self.delta, "sampler": None if self.sampler == "fixed" else self.sampler}  # fmt: skip
        given = [f"'privacy.{name}'" for name, value in used.items() if value is not None]
        if self.name == "none":
            if given:
                raise ValueError(f"{' and '.join(given)} without privacy=central_dp would do nothing")
        elif (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("privacy=central_dp needs one of 'privacy.noise_multiplier' and 'privacy.target_epsilon'")
        elif self.noise_multiplier != 0 and self.clip is None:
            raise ValueError("privacy=central_dp needs 'privacy.clip': without a bound no noise hides a client")
        if self.secure_aggregation == "none" and self.secagg != SecAggConfig():
            raise ValueError("'privacy.secagg' without 'privacy.secure_aggregation' (secagg, secagg+) would do nothing")
        if self.secure_aggregation == "secagg" and self.secagg.neighbours is not None:
            raise ValueError("'privacy.secagg.neighbours' is for secagg+: with secagg everybody is a neighbour")
        return self
