"""A sweep before it starts: its trials, their configurations, names and steps. Pure: no Ray, no files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtailor.core.errors import ConfigError
from fedtailor.core.overrides import merge_layers
from fedtailor.experiment.compose import check, compose
from fedtailor.experiment.config import ExperimentBase, clients_per_language, experiment_of, to_json
from fedtailor.experiment.fastest import settled
from fedtailor.experiment.stages import short_hash
from tune_spaces import PAPERS, grids
from tune_spaces.grid import OBJECTIVES, Grid, Objective, Value, combinations, for_task, look_up


@dataclass(frozen=True)
class SweepPlan:
    """Everything that a sweep is, and that a trial must know.

    Args:
        sweep_id: name of the sweep's folder, and the first part of the names of its runs.
        address: ``<paper>/<grid>``.
        grid: what is searched.
        objective: row of OBJECTIVES.
        asha: whether hopeless trials are stopped early.
        words: presets and overrides as typed.
        config: a trial's configuration as JSON-like data, without the searched values.
    """

    sweep_id: str
    address: str
    grid: Grid
    objective: str
    asha: bool
    words: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def judged(self) -> Objective:
        """What decides."""
        return OBJECTIVES[self.objective]

    @property
    def trials(self) -> list[dict[str, Value]]:
        """Searched values of each trial, by number."""
        return combinations(self.grid.space)

    @property
    def picked(self) -> dict[str, Value]:
        """What the paper chose, for the searched keys."""
        chosen = {key: value for paper in PAPERS for key, value in paper.PICKED.items()}
        return {key: chosen[key] for key in self.grid.space if key in chosen}

    @property
    def base_run(self) -> str:
        """Run that trains the base model before the first trial, and scores it."""
        return f"{self.sweep_id}-base"

    def number(self, values: Mapping[str, Any]) -> int:
        """Number of the trial with these values; other keys are ignored."""
        return self.trials.index({key: values[key] for key in self.grid.space})

    def run_id(self, number: int) -> str:
        """Run of a trial.

        The width is fixed, so that a listing is in order.
        """
        return f"{self.sweep_id}-{number:0{max(2, len(str(len(self.trials) - 1)))}d}"

    def base(self) -> ExperimentBase:
        """Configuration of `base_run`: the base model as it is, scored on the same clients."""
        return experiment_of({**self.config, "methods": ["base"]})

    def experiment(self, number: int) -> ExperimentBase:
        """Configuration of a trial."""
        words = [f"{key}={value!r}" for key, value in self.trials[number].items()]
        return experiment_of(merge_layers([self.config], words))

    def chunks(self) -> int:
        """Commits of one personalising stage."""
        exp = self.base()
        clients = len(exp.task.languages) * clients_per_language(exp) * len(exp.personalise.pools)
        return -(-clients // exp.personalise.chunk)

    def identity(self) -> dict[str, Any]:
        """What must be equal for a sweep to be taken up again; where it is kept and shown is not part of it."""
        config = {key: value for key, value in self.config.items() if key not in ("storage", "wandb")}
        return {
            "grid": self.address, "method": self.grid.method, "objective": self.objective, "asha": self.asha,
            "space": {key: list(values) for key, values in self.grid.space.items()}, "config": config,
        }  # fmt: skip


def make_plan(
    address: str, words: Sequence[str], objective_name: str | None = None, sweep_id: str | None = None,
    asha: bool = False,
) -> SweepPlan:  # fmt: skip
    """Composes a sweep from what was typed.

    The searched method runs alone. Without ``budgets=`` it runs at the largest budget of the configuration, and
    without ``personalise.pools=`` only clients that the objective looks at are personalised.

    Raises:
        ConfigError: unknown grid, objective or key, or a word that gives a searched key a value.
    """
    grid = look_up("unknown sweep", address, grids())
    name = objective_name or grid.objective
    look_up("'--objective': unknown", name, OBJECTIVES)
    presets = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    given = [word.split("=", 1)[0] for word in overrides]
    problems = [f"'{key}': is searched by {address}; leave it out" for key in given if key in grid.space]
    if "methods" in given:
        problems.append(f"'methods': {address} runs '{grid.method}' alone; leave it out")
    if problems:
        raise ConfigError(problems)
    exp, _ = settled(compose(presets, overrides))
    name = objective_name or for_task(name, exp.task_entry.kind)
    judged, pools = OBJECTIVES[name], exp.personalise.pools
    if "personalise.pools" not in given:
        pools = (judged.pool,)
    elif judged.pool not in pools:
        raise ConfigError(f"'personalise.pools': --objective {name} needs the {judged.pool} clients")
    config = to_json(exp)
    config["methods"] = [grid.method]
    config["personalise"] |= {"pools": list(pools)} | ({"score_train": True} if judged.on_train else {})
    if "budgets" not in given:
        config["budgets"] = [exp.budgets[-1]]
    if "://" not in exp.storage:  # trials run in folders of their own
        config["storage"] = str(Path(exp.storage).absolute())
    plan = SweepPlan("", address, grid, name, asha, tuple(words), to_json(experiment_of(config)))
    for number in range(len(plan.trials)):
        check(plan.experiment(number))
    if sweep_id is None:
        names = [Path(word).stem if word.endswith(".yaml") else word for word in presets] or [exp.task.name]
        sweep_id = "-".join([address.replace("/", "-"), *names, short_hash(plan.identity())[:8]])
    wandb = plan.config["wandb"]
    grouped = {**plan.config, "wandb": {**wandb, "group": wandb.get("group") or sweep_id}}
    return replace(plan, sweep_id=sweep_id, config=grouped)


def steps_of(stages: Sequence[Mapping[str, Any]], chunks: int) -> dict[str, tuple[int, int]]:
    """Stage key to its first step and its number of steps, over a trial's own stages; the last value of all is
    the number of steps of the trial. Rounds keep their steps if they end early, so that equal steps compare.

    >>> steps_of([{"key": "base/s", "kind": "base", "rounds": 9}, {"key": "strategy/s", "kind": "strategy",
    ... "rounds": 5}, {"key": "personalise/s", "kind": "personalise", "rounds": 0}], chunks=2)
    {'strategy/s': (0, 5), 'personalise/s': (5, 2)}
    """
    found, start = {}, 0
    for stage in stages:
        if stage["kind"] != "base":
            count = int(stage["rounds"]) or chunks
            found[str(stage["key"])] = start, count
            start += count
    return found
