"""One file per paper. The METHODS table is the only registry: adding a method is a file and a row in `FILES`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Final

from fedtailor.core.config import Config
from fedtailor.core.errors import ConfigError
from fedtailor.federated.method import Method, MethodEntry

FILES: Final = (
    "majority",
    "prior_shift",
    "base",
    "fedavg",
    "fedprox",
    "fedavgm",
    "fedadagrad",
    "fedadam",
    "fedyogi",
    "feddpa",
    "perfit",
    "dept",
    "lora",
    "adalora",
    "bayestune_lora",
    "ditto",
    "fedbabu",
    "centralised_lora",
    "homlora",
    "hetlora",
    "perfedavg_lora",
    "pf2lora",
    "fedl2p",
    "fedp2eft",
    "mix_grid",
    "mix_random",
    "mix_gradient",
    "fdlora",
    "pfedgpt",
)
"""The rows: files beside this one, each with its ``ENTRY``, in the order of columns and legends."""

METHODS: Final[dict[str, MethodEntry]] = {name: import_module(f"fedtailor.methods.{name}").ENTRY for name in FILES}
"""Name of a method to its entry; those from outside come after the rows, see `methods.external`."""


def build_method(name: str, config: Mapping[str, Any] | Config, r_max: int) -> Method:
    """Builds a row of the table from its resolved configuration.

    Raises:
        ConfigError: what the entry builds bears another name.
    """
    entry = METHODS[name]
    cfg = config if isinstance(config, Config) else entry.config.model_validate(dict(config))
    method = entry.build(cfg, r_max)
    if method.name != name:
        raise ConfigError(f"method {name}: its build function gives a method of the name '{method.name}'")
    return method
