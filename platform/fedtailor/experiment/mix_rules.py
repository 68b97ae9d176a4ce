"""Rules of methods that mix a client's own LoRA and the common one: what privacy hides, how many layers there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fedtailor.core.errors import ConfigError
from fedtailor.experiment.config import ExperimentBase, method_section
from fedtailor.methods.pfedgpt import SpaceConfig
from fedtailor.models.dimensions import dimensions
from fedtailor.models.families import ends
from fedtailor.training.mixing import projections


def mix_problems(exp: ExperimentBase) -> Iterator[str]:
    """Changes that are sent beside parameters which the server is not to see."""
    kind = exp.privacy.secure_aggregation
    for name, cfg in _sections(exp):
        if kind != "none" and cfg.delta_global == "mean_of_changes":
            yield (
                f"'{name}.delta_global' = mean_of_changes sends each client's change beside its parameters, which "
                f"together say where the clients' rounds began, and 'privacy.secure_aggregation' = {kind} masks a row "
                "of parameters only (allowed: global_difference)"
            )


def check_clusters(exp: ExperimentBase) -> None:
    """Refuses more clusters than a projection has layers; reads the model's config.

    Raises:
        ConfigError: names the key, the projection and its layers.
        ModelError: no config of the model is to be had.
    """
    problems = []
    asked = [(name, cfg) for name, cfg in _sections(exp) if cfg.clusters is not None and cfg.clusters > 1]
    if not asked:
        return
    known = dimensions(exp.model, 2, exp.task.max_length, exp.task_entry.kind)
    for name, cfg in asked:
        modules = [module for module, _, _ in known.linears if _is_target(module, cfg)]
        layers = Counter(projections(modules))
        fewest = min(layers, key=lambda kind: layers[kind], default=None)
        if fewest is not None and cfg.clusters is not None and layers[fewest] < cfg.clusters:
            problems.append(
                f"'{name}.clusters' = {cfg.clusters}: projection {fewest} of model={exp.model.name} has "
                f"{layers[fewest]} layers that carry this method's LoRA (allowed: 1 ... {layers[fewest]}, or null: as "
                "many as the layers show)"
            )
    if problems:
        raise ConfigError(problems)


def _is_target(module: str, cfg: SpaceConfig) -> bool:
    return isinstance(cfg.targets, str) or any(ends(module, target) for target in cfg.targets)


def _sections(exp: ExperimentBase) -> Iterator[tuple[str, SpaceConfig]]:
    for name in exp.methods:
        if isinstance(cfg := method_section(exp, name), SpaceConfig):
            yield name, cfg
