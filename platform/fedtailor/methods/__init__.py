"""One file per paper. The METHODS table is the only registry: adding a method is a file and a row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from fedtailor.core.config import Config
from fedtailor.federated.method import Method
from fedtailor.methods import adalora, base, bayestune_lora, dept, fedavg, feddpa, fedl2p, fedp2eft, lora, majority


@dataclass(frozen=True)
class MethodEntry:
    """How a method is configured and built.

    Args:
        config: its configuration; the section of the same name in the tree.
        build: (config, largest budget) to `Method`.
        summary: one line for ``fedtailor list methods``.
    """

    config: type[Config]
    build: Callable[[Any, int], Method]
    summary: str


METHODS: Final[Mapping[str, MethodEntry]] = {
    "majority": MethodEntry(majority.MajorityConfig, majority.build, "each client's most frequent training class"),
    "base": MethodEntry(base.BaseConfig, base.build, "the base model as it is"),
    "fedavg": MethodEntry(fedavg.FedAvgConfig, fedavg.build, "FedAvg, full fine-tuning or LoRA (McMahan et al. 2017)"),
    "feddpa": MethodEntry(
        feddpa.FedDpaConfig, feddpa.build, "FedDPA-T: global LoRA and a local one per client (Yang et al. 2024)"
    ),
    "dept": MethodEntry(
        dept.DeptConfig, dept.build, "DEPT (SPEC): FedAvg with each client's own embeddings (Iacob et al. 2025)"
    ),
    "lora": MethodEntry(lora.LoraConfig, lora.build, "LoRA per client, rank r everywhere (Hu et al. 2022)"),
    "adalora": MethodEntry(
        adalora.AdaLoraConfig, adalora.build, "AdaLoRA per client, ranks pruned while training (Zhang et al. 2023)"
    ),
    "bayestune_lora": MethodEntry(
        bayestune_lora.BayesTuneLoraConfig,
        bayestune_lora.build,
        "per-client Bayesian rank search (FedP2EFT 3.2)",
    ),
    "fedl2p": MethodEntry(
        fedl2p.FedL2PConfig, fedl2p.build, "federated net for the learning rates of LoRA (Lee et al. 2023)"
    ),
    "fedp2eft": MethodEntry(
        fedp2eft.FedP2EFTConfig,
        fedp2eft.build,
        "federated strategy generator for LoRA ranks (Lee et al. 2025)",
    ),
}


def build_method(name: str, config: Mapping[str, Any] | Config, r_max: int) -> Method:
    """Builds a row of the table from its resolved configuration."""
    entry = METHODS[name]
    cfg = config if isinstance(config, Config) else entry.config.model_validate(dict(config))
    return entry.build(cfg, r_max)
