"""Opens the runs of a comparison and refuses those that cannot stand side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedtailor.core.errors import ConfigError, StorageError
from fedtailor.experiment.config import nearest
from fedtailor.report.compare_people import People, people_of
from fedtailor.report.metrics import Measure, primary
from fedtailor.report.scores import checked, scores
from fedtailor.report.wording import at, text
from fedtailor.storage.digest import committed_stages, digest
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder, run_ids


@dataclass(frozen=True)
class Side:
    """One run of a comparison.

    Args:
        folder: the run.
        info: content of its ``run.json``.
        state: as its status says.
        stages: how many stages are finished, of how many.
        digest: hex sha256 over what it computed; None while a stage is unfinished.
        scored: rows of `results.scores`.
        people: seed to clients, where they can be told.
    """

    folder: RunFolder
    info: Mapping[str, Any]
    state: str
    stages: tuple[int, int]
    digest: str | None
    scored: pd.DataFrame
    people: Mapping[int, People]

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self.folder.run_id

    @property
    def measure(self) -> Measure:
        """What the run's clients are scored by."""
        return primary(self.scored)

    @property
    def values(self) -> pd.DataFrame:
        """Scores of personalised clients by the run's measure, rows of METRIC_COLUMNS."""
        return self.scored[self.scored["metric"] == self.measure.name]


def open_sides(storage: Storage, names: Sequence[str]) -> tuple[Side, ...]:
    """Opens the runs in the order given.

    Args:
        storage: where they are.
        names: run ids, two or more.

    Raises:
        ConfigError: fewer than two, one named twice, or runs of different tasks or label sets.
        StorageError: no such run (names the nearest), one without results, or one whose files are damaged.
    """
    _refuse_names(storage, names)
    folders = [RunFolder.open(storage, name) for name in names]
    _refuse_tasks({folder.run_id: text(at(folder.info().get("config"), "task.name")) for folder in folders})
    sides = tuple(_side(folder) for folder in folders)
    _refuse_labels(sides)
    return sides


def _refuse_names(storage: Storage, names: Sequence[str]) -> None:
    problems = []
    if len(set(names)) < 2:
        problems.append(f"a comparison needs two different runs or more, got {', '.join(names) or 'none'}")
    else:
        problems += [f"run '{name}' is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise ConfigError(problems)
    known = run_ids(storage)
    unknown = [f"no run '{name}' in {storage.url}{nearest(name, known)}" for name in names if name not in known]
    if unknown:
        raise StorageError(f"{'; '.join(unknown)} (runs there: {', '.join(known) or 'none'})")


def _refuse_tasks(tasks: Mapping[str, str]) -> None:
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"'{run_id}': {task}" for run_id, task in tasks.items())
        raise ConfigError(f"runs of different tasks cannot be compared ({listed})")


def _refuse_labels(sides: Sequence[Side]) -> None:
    names = f"{sides[0].measure.groups}" if sides[0].measure.own_groups else "classes"
    labels = {side.run_id: next(iter(side.people.values())).labels for side in sides if side.people}
    if len({frozenset(own) for own in labels.values()}) > 1:
        listed = "; ".join(f"'{run_id}': {', '.join(own)}" for run_id, own in labels.items())
        raise ConfigError(f"runs with different {names} cannot be compared ({listed})")


def _side(folder: RunFolder) -> Side:
    state = str(folder.status()["state"])
    scored = scores(checked(folder.metrics("personalise")))
    if not (scored["metric"] == primary(scored).name).any():
        raise StorageError(
            f"run '{folder.run_id}' ({state}) has committed no score of a personalised client; "
            f"go on with it: fedtailor resume {folder.run_id}"
        )
    listed = committed_stages(folder)
    done = sum(stage["done"] for stage in listed)
    whole = digest(folder.storage, folder.run_id) if done == len(listed) else None
    return Side(folder, folder.info(), state, (done, len(listed)), whole, scored, people_of(folder))
