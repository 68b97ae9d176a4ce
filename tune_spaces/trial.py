"""One trial: an ordinary run, played inside its own placement group, that tells Tune what it has committed."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pandas as pd
from ray import tune

from actors.client_actor import adopt_environment
from fedtailor.core.config import resolve
from fedtailor.core.errors import DataError, Interrupted, LockedError
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.config import ExperimentBase, overrides_of, to_json
from fedtailor.experiment.launch import Backend, InProcess, launch, run_serial
from fedtailor.federated.pool import OnEvent
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import METRICS
from fedtailor.storage.run_folder import RunFolder
from tune_spaces.plan import SweepPlan, steps_of
from tune_spaces.results import is_complete, value_of

FREE = ("storage", "wandb")
"""Keys that may differ when a trial is taken up again."""

DYING_S = 60.0

ROUND_LOSSES = ("val_loss", "train_loss")
"""Metrics of a round that tell how it goes, the first that a method has."""


def play(config: Mapping[str, Any], plan: SweepPlan, place: Mapping[str, Any]) -> None:
    """Tune's trainable: makes or resumes the trial's run and reports after every commit.

    Reports ``step`` (commits of the trial's own stages), ``progress`` (larger is better; see `Watch`) and at the end
    ``value`` (the objective) with ``finished``.

    Args:
        config: values of the searched keys.
        plan: the sweep.
        place: arguments of `adopt_environment`: relative paths of the configuration mean the folder of whoever
            started the sweep, and Tune has moved the process to a folder of its own.

    Raises:
        TailorError: what ended the run; what is committed stays.
    """
    adopt_environment(**place)
    number = plan.number(config)
    exp = plan.experiment(number)
    run = RunFolder.create(Storage(exp.storage), plan.run_id(number), to_json(exp), overrides_of(exp), ignore=FREE)
    watch = Watch(plan, run)
    if not is_complete(run):
        try:
            _launch(run, exp, watch)
        except Interrupted:
            sys.exit(0)  # as `tune.report` asked for
    value = value_of(plan, run)
    tune.report({"step": watch.last, "progress": plan.judged.better(value), "value": value, "finished": True})


def _launch(run: RunFolder, exp: ExperimentBase, watch: Watch) -> None:
    """Waits a while for the process that had this trial before: killed with its sweep, it may still be dying."""
    deadline = time.monotonic() + DYING_S
    while True:
        try:
            return launch(_backend(exp), run, exp, watch.emit, lambda: False)
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


class Watch:
    """Turns the progress of a run into reports.

    A round is judged by the loss of its cohort, a chunk of personalised clients by the objective over those so far:
    all trials meet the same cohorts and clients at the same step, so values of one step compare.

    Args:
        plan: the sweep.
        run: the trial's run.
    """

    def __init__(self, plan: SweepPlan, run: RunFolder) -> None:
        self._plan, self._run = plan, run
        self._steps: dict[str, tuple[int, int]] = {}

    @property
    def last(self) -> int:
        """Number of steps of the trial."""
        steps = steps_of(self._run.stages(), self._plan.chunks())
        return max(start + count for start, count in steps.values())

    def emit(self, event: Mapping[str, Any]) -> None:
        """Takes an event of the run; commits of the trial's own stages are reported, but for the last."""
        if event["kind"] != "progress":
            return
        self._steps = self._steps or steps_of(self._run.stages(), self._plan.chunks())
        if event["stage"] not in self._steps:
            return
        step = self._steps[event["stage"]][0] + int(event["done"])
        if step >= max(start + count for start, count in self._steps.values()):
            return
        progress = self._progress(str(event["stage"]), int(event["done"]) - 1)
        try:
            tune.report({"step": step, "progress": progress})
        except SystemExit:  # how Tune ends a trial that it gives up
            raise Interrupted(f"the sweep stopped this trial at step {step}: its commits are kept") from None

    def _progress(self, key: str, index: int) -> float:
        if key.startswith("personalise"):
            return self._plan.judged.better(value_of(self._plan, self._run))
        stage = next(stage for stage in self._run.stages() if stage["key"] == key)
        rows: pd.DataFrame = self._run.log(stage).read(index).table(METRICS).to_pandas()
        return -round_loss(rows)


def round_loss(rows: pd.DataFrame) -> float:
    """Loss of a round's cohort, each client by its examples.

    Raises:
        DataError: the method reports none of `ROUND_LOSSES`.
    """
    for name in ROUND_LOSSES:
        found = rows[rows["metric"] == name]
        if len(found):
            return float((found["value"] * found["weight"]).sum() / found["weight"].sum())
    raise DataError(f"no client reports one of {', '.join(ROUND_LOSSES)}")


def _backend(exp: ExperimentBase) -> Backend:
    """Drives a run in this process; its client actors, if any, take the bundles of this trial."""
    if exp.engine.backend == "serial":
        return run_serial
    from actors.metrics import CommitMetrics
    from actors.ray_pool import RayPool

    def drive(
        entry: str, payload: Mapping[str, Any], _: EngineConfig, on_event: OnEvent, should_stop: Callable[[], bool]
    ) -> None:
        here, run = InProcess(on_event, should_stop), str(payload["run_id"])
        resolve(entry)(payload, partial(RayPool, run=run), CommitMetrics(here, run), here)

    return drive
