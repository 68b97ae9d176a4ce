"""No personalisation: every client is evaluated with the base model ("base" in the tables of FedP2EFT)."""

from __future__ import annotations

from fedtailor.aggregation.weighted_mean import WeightedMean
from fedtailor.core.config import Config
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.server_optim.sgd import ServerSgd
from fedtailor.training.finetune import NoPersonalisation


class BaseConfig(Config):
    """Nothing to set."""


def build(cfg: BaseConfig, r_max: int) -> Method:
    """A client-only method without training."""
    return Method("base", NoPersonalisation(), WeightedMean(), ServerSgd())


ENTRY = MethodEntry(
    name="base",
    config=BaseConfig,
    build=build,
    title="Base",
    summary="the base model as it is",
    colour="#4a4f57",
    marker="|",
    tiny={},
)
