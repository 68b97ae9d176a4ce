"""The whole configuration tree: sections of `core.settings` plus one section per row of METHODS."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any

from pydantic import Field, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from fedtailor.core.config import Config, completed, deviations, validate
from fedtailor.core.errors import ConfigError, did_you_mean
from fedtailor.core.settings import (
    AggregationConfig,
    AttackConfig,
    BaseStageConfig,
    Cohort,
    DecodingConfig,
    EngineConfig,
    ModelConfig,
    PersonaliseStageConfig,
    Positive,
    StrategyStageConfig,
    WandbConfig,
)
from fedtailor.federated.method import Method
from fedtailor.methods import FILES, METHODS, build_method
from fedtailor.methods.external import resolved
from fedtailor.models.source import embedded_for
from fedtailor.privacy.config import PrivacyConfig
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import TaskEntry
from fedtailor.tasks.task import TASKS, task_config


class ExperimentBase(Config):
    """A run: a matrix methods x budgets x seeds. Defaults: FedP2EFT section 4.1."""

    code: Mapping[str, str] = {}
    """Methods from outside, name to ``package.module:ENTRY``; filled in from ``methods`` and ``base.name``."""
    methods: tuple[str, ...] = ("majority", "base", "lora", "bayestune_lora", "fedp2eft")
    """Names, or ``package.module:ENTRY`` of a method from outside."""
    budgets: tuple[Positive, ...] = (2, 4, 8, 16)
    """r: total rank r L over the L adapted layers."""
    r_max: Positive = 16
    """The paper's r_max target: the largest budget that a trained strategy serves."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (42,)
    """The paper averages over 42, 52, 62."""
    scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Shrinks rounds and clients for small machines: rounds * scale, and of the clients of each language and pool,
    partitioned as always, the first share. The cohort stays a share of the pool. Printed in every caption."""
    storage: str = "./runs"
    save_adapters: bool = False
    """Write every personalised client as a peft adapter folder."""
    task: TaskConfig = TaskConfig()
    model: ModelConfig = ModelConfig()
    base: BaseStageConfig = BaseStageConfig()
    strategy: StrategyStageConfig = StrategyStageConfig()
    personalise: PersonaliseStageConfig = PersonaliseStageConfig()
    decoding: DecodingConfig = DecodingConfig()
    aggregation: AggregationConfig = AggregationConfig()
    attack: AttackConfig = AttackConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    engine: EngineConfig = EngineConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="before")
    @classmethod
    def _follow_task(cls, value: Any) -> Any:
        """Keys of the task that are not given are its own, and methods' sections may follow it where they are silent;
        one that asks for text starts from a language model, and from methods that can answer."""
        if not isinstance(value, dict):
            return value
        task = value.get("task", {})
        task = {"name": task} if isinstance(task, str) else task
        name = task.get("name") if isinstance(task, dict) else getattr(task, "name", None)
        entry = TASKS.get(name) if isinstance(name, str) else None
        if entry and isinstance(task, dict):
            value = {**value, "task": {**entry.defaults, **task}}
        if entry and entry.kind != "classification":
            usual, model = cls.model_fields["methods"].default, value.get("model", {})
            value = {"methods": tuple(m for m in usual if m != "majority"), **value}
            if isinstance(model, dict):
                value["model"] = {"name": embedded_for(entry.kind), **model}
        try:
            known = TaskConfig.model_validate(value.get("task", {}))
        except ValidationError:
            return value  # told with the tree's other problems
        given = {name: value[name] for name in METHODS if isinstance(value.get(name), dict)}
        return {**value, **{name: METHODS[name].config.for_task(section, known) for name, section in given.items()}}

    @field_validator("methods", "seeds", "budgets")
    @classmethod
    def _some(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        if not value:
            raise ValueError("needs at least one entry")
        if len(set(value)) != len(value):
            raise ValueError("has repeats")
        return value

    @field_validator("methods")
    @classmethod
    def _known_methods(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        known = [*FILES, *info.data.get("code", {})]
        for name in value:
            _refuse_unknown("methods", "method", name, known)
        return value

    @field_validator("base")
    @classmethod
    def _known_base(cls, value: BaseStageConfig, info: ValidationInfo) -> BaseStageConfig:
        known = [name for name in (*FILES, *info.data.get("code", {})) if METHODS[name].base]
        if value.name not in (*known, "none"):
            hint = did_you_mean(value.name, known)
            raise ValueError(f"'base.name': unknown base '{value.name}'{hint} (allowed: {', '.join((*known, 'none'))})")
        return value

    @field_validator("budgets")
    @classmethod
    def _ascending(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(value))

    @property
    def used_methods(self) -> tuple[str, ...]:
        """The base stage's method, if there is one, and the methods, each once."""
        base = () if self.base.name == "none" else (self.base.name,)
        return tuple(dict.fromkeys((*base, *self.methods)))

    @property
    def task_entry(self) -> TaskEntry:
        """What is known of the task without its data."""
        return TASKS[self.task.name]

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: TaskConfig) -> TaskConfig:
        _refuse_unknown("task.name", "task", value.name, TASKS)
        return value


def _refuse_unknown(key: str, what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise ValueError(f"'{key}': unknown {what} '{name}'{did_you_mean(name, known)} (known: {', '.join(known)})")


def _has_section(method: str) -> bool:
    """Methods with nothing to set have none (and `base` is the name of a stage)."""
    return method in METHODS and bool(METHODS[method].config.model_fields)


@cache
def _with_sections(sections: tuple[tuple[str, type[Config]], ...]) -> type[ExperimentBase]:
    fields: dict[str, Any] = {name: (config, config()) for name, config in sections}
    return create_model("Experiment", __base__=ExperimentBase, **fields)


def _sections(methods: Iterable[str]) -> tuple[tuple[str, type[Config]], ...]:
    return tuple((name, METHODS[name].config) for name in methods if _has_section(name))


Experiment: type[ExperimentBase] = _with_sections(_sections(FILES))
"""`ExperimentBase` with a section for every method, e.g. ``fedp2eft.psg.lr``."""


def experiment_of(tree: Mapping[str, Any]) -> ExperimentBase:
    """Builds the tree; methods from outside are imported, and have sections like the others.

    Raises:
        ConfigError: every problem found.
    """
    tree = resolved(tree)
    return validate(_class_for(tree), tree)


def stored_experiment(tree: Mapping[str, Any]) -> ExperimentBase:
    """The configuration that a run folder holds; keys that came after the run mean what was done before them.

    Raises:
        ConfigError: every problem found.
    """
    tree = resolved(tree)
    kind = _class_for(tree)
    return validate(kind, completed(kind, tree))


def _class_for(tree: Mapping[str, Any]) -> type[ExperimentBase]:
    """The tree's class, with a section for every method from outside that it names."""
    code = tree.get("code", {})
    if taken := [name for name in code if name in ExperimentBase.model_fields]:
        raise ConfigError(
            f"'methods': '{code[taken[0]]}' has the name '{taken[0]}', which is a key of the configuration"
        )
    return _with_sections(_sections((*FILES, *code)))


def method_section(experiment: ExperimentBase, method: str) -> Config:
    """Configuration of one method."""
    section: Config = getattr(experiment, method) if _has_section(method) else METHODS[method].config()
    return section.beside(experiment)


def method_of(experiment: ExperimentBase, name: str, r_max: int | None = None) -> Method:
    """A method as configured, for budgets up to ``r_max``, by default the run's."""
    return build_method(name, method_section(experiment, name), r_max or experiment.r_max)


def method_notes(exp: ExperimentBase, methods: Sequence[str]) -> list[str]:
    """What methods say of how they are configured, for captions and plans, each once; most say nothing."""
    said = {name: METHODS[name].note for name in methods if name in METHODS}
    return [text for name, note in said.items() if note is not None and (text := note(method_section(exp, name)))]


def server_side_of(experiment: ExperimentBase) -> dict[str, Any]:
    """Sections around every method that differ from their defaults, as JSON-like data."""
    sections = {name: getattr(experiment, name) for name in ("aggregation", "attack", "privacy")}
    return {name: to_json(section) for name, section in sections.items() if section != type(section)()}


def scaled(number: int, scale: float) -> int:
    """A number of rounds or clients at a scale: rounded, but not to zero.

    >>> scaled(150, 0.1), scaled(10, 0.25), scaled(10, 0.01), scaled(0, 0.5)
    (15, 2, 1, 0)
    """
    return number if scale == 1 else min(number, max(1, round(number * scale)))


def scaled_task(exp: ExperimentBase) -> TaskConfig:
    """The task with the clients that the scale leaves, unless their number is given."""
    if exp.scale == 1 or exp.task.clients_kept is not None:
        return exp.task
    kept = scaled(exp.task.clients_per_language, exp.scale)
    return exp.task.model_copy(update={"clients_kept": kept})


def clients_per_language(exp: ExperimentBase) -> int:
    """Clients of each language and pool."""
    return scaled_task(exp).clients_used


def seen_clients(exp: ExperimentBase) -> int:
    """Clients that cohorts are drawn from, where their number is configured; with ``task.dealing`` of all languages."""
    return clients_per_language(exp) * (1 if exp.task.dealing else len(exp.task.languages))


def base_seed(exp: ExperimentBase, seed: int) -> int:
    """Seed of partition and base for a run seed."""
    return seed if exp.base.seed is None else exp.base.seed


def cohort_size(cohort: Cohort, pool: int) -> int:
    """Clients per round: a share below 1 (rounded to nearest), a number from 1 on, or all.

    >>> cohort_size(0.1, 160), cohort_size(16, 160), cohort_size(1.0, 160), cohort_size("all", 160)
    (16, 16, 1, 160)
    """
    if cohort == "all":
        return pool
    return round(cohort * pool) if cohort < 1 else int(cohort)


def to_json(config: Config) -> dict[str, Any]:
    """JSON-like data of a configuration."""
    data: dict[str, Any] = json.loads(config.model_dump_json())
    if isinstance(config, ExperimentBase) and not config.code:
        del data["code"]  # runs without methods from outside keep their names
    return data


def overrides_of(experiment: ExperimentBase) -> list[dict[str, Any]]:
    """Every numeric choice that departs from the paper's default, for captions: key, default, value."""
    neutral = ("engine.", "wandb.", "storage", "save_adapters", "methods", "code", "task.path", "model.path")
    used = {*experiment.methods, experiment.base.name}
    found = []
    usual = type(experiment)(task=task_config(experiment.task.name))
    for key, (default, value) in deviations(experiment, usual).items():
        section = key.split(".")[0]
        if key.startswith(neutral) or key.endswith("_column") or (_has_section(section) and section not in used):
            continue
        found.append({"key": key, "default": default, "value": value})
    return found
