"""Presets and overrides to a checked configuration."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fedtailor.core.errors import ConfigError, did_you_mean
from fedtailor.core.overrides import merge_layers
from fedtailor.experiment.config import ExperimentBase, experiment_of, method_of, method_section, seen_clients
from fedtailor.experiment.mix_rules import mix_problems
from fedtailor.experiment.rules import (
    ASKED,
    model_problems,
    population_problems,
    server_problems,
    task_problems,
    zero_problems,
)
from fedtailor.models.source import EMBEDDED_LINEAR


def preset_names() -> list[str]:
    """Names of the shipped presets."""
    folder = resources.files("fedtailor.presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_preset(name: str) -> dict[str, Any]:
    """The tree of a shipped preset, or of a file where the name ends in ``.yaml``.

    Raises:
        ConfigError: no preset of this name, or a file that cannot be read as a tree of keys.
    """
    known = preset_names()
    if name not in known and not name.endswith(".yaml"):
        raise ConfigError(f"unknown preset '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")
    file = Path(name) if name.endswith(".yaml") else resources.files("fedtailor.presets") / f"{name}.yaml"
    try:
        tree = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).split("\n")[0]
        raise ConfigError(f"cannot read the preset file '{name}': {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"the preset file '{name}' is not a tree of keys")
    return tree


def compose(presets: list[str], overrides: list[str]) -> ExperimentBase:
    """Layers presets from left to right, then overrides, and checks everything that needs no data.

    A preset is the name of a shipped one, or a file whose name ends in ``.yaml``.

    Raises:
        ConfigError: every problem found.
    """
    experiment = experiment_of(merge_layers([load_preset(name) for name in presets], overrides))
    check(experiment)
    return experiment


def check(experiment: ExperimentBase) -> None:
    """Rules between sections.

    Raises:
        ConfigError: every rule that is broken.
    """
    problems: list[str] = []
    if experiment.budgets[-1] > experiment.r_max:
        problems.append(
            f"'budgets': {experiment.budgets[-1]} is above 'r_max' = {experiment.r_max}; a trained strategy serves "
            f"budgets up to r_max (allowed: 1 ... {experiment.r_max})"
        )
    problems += task_problems(experiment)
    problems += _regression_problems(experiment)
    problems += _validation_problems(experiment)
    problems += model_problems(experiment)
    problems += zero_problems(experiment)
    problems += server_problems(experiment)
    problems += mix_problems(experiment)
    if experiment.task_entry.clients == "dealt":
        problems += population_problems(experiment, seen_clients(experiment))
    if problems:
        raise ConfigError(problems)


def _validation_problems(exp: ExperimentBase) -> Iterator[str]:
    """A validation pool that a method asks for and nobody draws, or that a task cannot have."""
    per_class, kind = exp.task.validation_per_class, exp.task_entry.kind
    if per_class and kind not in ("classification", "generation"):
        yield (
            f"'task.validation_per_class' = {per_class} is of each class or group, and task '{exp.task.name}' asks for "
            f"{ASKED[kind]} (allowed: 0)"
        )
    for name in exp.used_methods:
        if not per_class and method_of(exp, name).validation_pool:
            own = hasattr(method_section(exp, name), "validation")
            yield (
                f"'methods': {name} tunes on a validation pool, and there is none: set task.validation_per_class, the "
                "training rows of each class that the server may see (pFedGPT: 40)"
                + (f", or {name}.validation=own_holdout" if own else "")
            )


def _regression_problems(exp: ExperimentBase) -> Iterator[str]:
    """What made-up regressions rule out, and the model that is for them alone."""
    kind, model = exp.task_entry.kind, exp.model.name
    if kind != "regression":
        if model == EMBEDDED_LINEAR:
            yield f"'model.name': {model} predicts numbers, and task '{exp.task.name}' asks for {ASKED[kind]}"
        return
    if model != EMBEDDED_LINEAR:
        yield (
            f"'model.name': {model} reads texts, and task '{exp.task.name}' asks for numbers (allowed: "
            f"{EMBEDDED_LINEAR})"
        )
    if exp.base.name == "none":  # else the methods' own words would repeat it
        for name in exp.methods:
            if (adapter := method_of(exp, name).adapter) is not None and adapter.trains_base:
                yield f"'methods': {name} trains every weight, and here these are the data"
    tables, made_up, layer = "the base's weights are the data", "nobody is behind made-up rows", "it is one layer"
    for key, value, allowed, why in (
        ("base.name", exp.base.name, "none", tables),
        ("model.weights", exp.model.weights, "float32", tables),
        ("engine.dtype", exp.engine.dtype, "float32", tables),
        ("engine.zero.ranks", exp.engine.zero.ranks, 1, layer),
        ("model.checkpointing", exp.model.checkpointing, False, layer),
        ("model.attention", exp.model.attention, None, layer),
        ("save_adapters", exp.save_adapters, False, "peft cannot load the model"),
        ("privacy", exp.privacy.name, "none", made_up),
        ("privacy.secure_aggregation", exp.privacy.secure_aggregation, "none", made_up),
        ("scale", exp.scale, 1.0, "both clients are needed; shorten a run by strategy.rounds"),
        ("task.clients_kept", exp.task.clients_kept, None, "both clients are needed"),
    ):
        if value != allowed:
            told = "null" if allowed is None else str(allowed).lower()
            yield f"'{key}' = {value}: not for task '{exp.task.name}', {why} (allowed: {told})"
