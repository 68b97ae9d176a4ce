"""Ray Tune over the grid: a placement group per trial, and in it an ordinary run that tells Tune what it commits."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler

from actors.client_actor import adopt_environment, forwarded_environment
from actors.placement import ActorPlan
from fedtailor.core.config import resolve
from fedtailor.core.errors import DataError, Interrupted, LockedError, StorageError
from fedtailor.core.settings import EngineConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.launch import Backend, launch, run_serial
from fedtailor.experiment.prepare import run_folder
from fedtailor.federated.pool import OnEvent
from fedtailor.storage.round_store import METRICS
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tracking.progress import LINE_EVERY_S
from tune_spaces.grid import assignments
from tune_spaces.plan import SweepPlan, steps_of
from tune_spaces.results import TUNE, is_complete, value_of

RETRIES: Final = 2
"""How often a trial whose process died is started again; it goes on from its last commit."""

REDUCTION: Final = 3
"""ASHA keeps one in so many trials at every rung: after a ninth and a third of a trial's steps."""

_ENVIRONMENT: Final = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with `verbose=0`: silence; the new output prints boxes all the same
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV and TensorBoard would repeat what is committed
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

_DYING_S = 60.0
_ROUND_LOSSES = ("val_loss", "train_loss")
"""Metrics of a round that tell how it goes, the first that a method has."""


def search(
    plan: SweepPlan, folder: Path, actors: ActorPlan, at_once: int | None, show: OnEvent
) -> tuple[list[int], dict[int, str]]:
    """Runs what is missing of all trials; returns when all are over, or when Tune was asked to end.

    Args:
        plan: the sweep.
        folder: the sweep's folder; ``tune/`` below it is Tune's.
        actors: workers of one trial.
        at_once: most trials at a time; None: as many as fit. Fixed when a sweep starts first.
        show: receives events of the kind ``trial``.

    Returns:
        Numbers of the trials that ASHA stopped, and number to what went wrong.

    Raises:
        StorageError: Tune's folder has more trials than the grid.
    """
    global _watched
    _watched = plan, show, {}
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    group = tune.PlacementGroupFactory(bundles(actors, plan.config["engine"]["backend"] == "serial"))
    place = {"environment": forwarded_environment(), "folder": os.getcwd()}
    trainable = tune.with_resources(tune.with_parameters(play, plan=plan, place=place), group)
    results: Any = _tuner(plan, folder, trainable, at_once).fit()
    if len(results) > len(plan.trials):
        raise StorageError(f"Tune knows {len(results)} trials of {plan.sweep_id}, the grid has {len(plan.trials)}")
    stopped, errors = [], {}
    for result in results:
        if result.config is None:  # asked to end before it had started
            continue
        if result.error is not None:
            errors[plan.number(result.config)] = str(result.error).strip().split("\n")[-1]
        elif not (result.metrics or {}).get("finished"):
            stopped.append(plan.number(result.config))
    return stopped, errors


def bundles(plan: ActorPlan, serial: bool) -> list[dict[str, float]]:
    """The placement group of a trial: its driver, which computes nothing and takes no CPU, then its workers.

    Nothing inside a trial makes another group: Tune lets a group capture the actors that its driver makes, and
    `actors.session.cluster_nodes` counts the group's bundles, not the cluster's nodes. Ray allows no empty bundle;
    Tune drops an empty first one and lets the driver ride along in the group without resources. With the serial
    backend the driver is the worker.

    >>> bundles(ActorPlan(2, num_cpus=1, num_gpus=0, memory_fraction=None, capacity=2), serial=False)
    [{'CPU': 0.0}, {'CPU': 1}, {'CPU': 1}]
    """
    worker = {"CPU": plan.num_cpus} | ({"GPU": plan.num_gpus} if plan.num_gpus else {})
    return [worker] if serial else [{"CPU": 0.0}, *(dict(worker) for _ in range(plan.count))]


def _tuner(plan: SweepPlan, folder: Path, trainable: Any, at_once: int | None) -> Any:
    own = folder / TUNE
    if tune.Tuner.can_restore(str(own)) and any(own.glob("experiment_state-*.json")):
        return tune.Tuner.restore(str(own), trainable, resume_unfinished=True, restart_errored=True)
    if own.exists():  # killed before Tune had written its first state: no trial has a run that it could lose
        shutil.rmtree(own)
    asha = ASHAScheduler(
        time_attr="share",
        metric="progress",
        mode="max",
        max_t=2,  # larger than any share: a trial that has done all of its steps is not stopped but done
        grace_period=REDUCTION**-2,  # type: ignore[arg-type]  # Tune only compares and multiplies it
        reduction_factor=REDUCTION,
    )
    return tune.Tuner(
        trainable,
        param_space={key: tune.grid_search(list(values)) for key, values in plan.grid.space.items()},
        # A process that has played one trial plays the next: starting one costs as much as a small trial.
        tune_config=tune.TuneConfig(
            max_concurrent_trials=at_once, scheduler=asha if plan.asha else None, reuse_actors=True
        ),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[_Callback(), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            verbose=0,
        ),
    )


_watched: tuple[SweepPlan, OnEvent, dict[int, float]]
"""The sweep of this process, who shows its events, and when a trial was last shown."""


class _Callback(tune.Callback):
    """Shows what happens to trials. Tune pickles it and reads it back when it restores, so it can hold no console."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _show("started", trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        # Not yet the trial's last result.
        if not result.get("finished"):
            _show("step", trial, f"step {result.get('step')}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        plan, last = _watched[0], trial.last_result or {}
        if last.get("finished"):
            _show("over", trial, f"done, {plan.objective} {plan.judged.shown(last['value'], unit=True)}")
        else:
            _show("over", trial, f"stopped early by ASHA at step {last.get('step')}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _show("failed", trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _show("was lost and starts again at its last commit", trial)


def _show(what: str, trial: Any, state: str = "") -> None:
    """Shows an event of the kind ``trial``; steps only now and then."""
    plan, show, shown = _watched
    number, now = plan.number(trial.config), time.monotonic()
    if what == "step" and now - shown.get(number, 0.0) < LINE_EVERY_S:
        return
    shown[number] = now
    text = f"trial {plan.run_id(number)} ({assignments(plan.trials[number])})  {state or what}"
    show({"kind": "trial", "run": plan.run_id(number), "what": what, "text": text})


def play(config: Mapping[str, Any], plan: SweepPlan, place: Mapping[str, Any]) -> None:
    """Tune's trainable: makes or resumes the trial's run and reports after every commit.

    Reports ``step`` (commits of the trial's own stages), ``share`` (of all its steps), ``progress`` (larger is better;
    see `Watch`) and at the end ``value`` (the objective) with ``finished``.

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
    run = run_folder(exp, plan.run_id(number))
    watch = Watch(plan, run)
    if not is_complete(run):
        try:
            _launch(run, exp, watch.emit)
        except Interrupted:
            sys.exit(0)  # as `tune.report` asked for
    value = value_of(plan, run)
    progress = plan.judged.better(value)
    tune.report({"step": watch.last, "share": 1.0, "progress": progress, "value": value, "finished": True})


def _launch(run: RunFolder, exp: ExperimentBase, emit: OnEvent) -> None:
    """Waits a while for the process that had this trial before: killed with its sweep, it may still be dying."""
    deadline = time.monotonic() + _DYING_S
    while True:
        try:
            return launch(_backend(exp), run, exp, emit, lambda: False)
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

    @cached_property
    def _steps(self) -> dict[str, tuple[int, int]]:
        return steps_of(self._run.stages(), self._plan.chunks())

    @property
    def last(self) -> int:
        """Number of steps of the trial, once its stages are known."""
        return max(start + count for start, count in self._steps.values())

    def emit(self, event: Mapping[str, Any]) -> None:
        """Takes an event of the run; commits of the trial's own stages are reported, but for the last."""
        if event["kind"] != "progress" or event["stage"] not in self._steps:
            return
        step = self._steps[event["stage"]][0] + int(event["done"])
        if step >= self.last:
            return
        progress = self._progress(str(event["stage"]), int(event["done"]) - 1)
        try:
            tune.report({"step": step, "share": step / self.last, "progress": progress})
        except SystemExit:  # how Tune ends a trial that it gives up
            raise Interrupted(f"the sweep stopped this trial at step {step}: its commits are kept") from None

    def _progress(self, key: str, index: int) -> float:
        """Raises `DataError` if the method reports none of `_ROUND_LOSSES`."""
        if key.startswith("personalise"):
            return self._plan.judged.better(value_of(self._plan, self._run))
        stage = next(stage for stage in self._run.stages() if stage["key"] == key)
        rows = self._run.log(stage).read(index).table(METRICS).to_pandas()
        for name in _ROUND_LOSSES:
            losses = rows[rows["metric"] == name]
            if len(losses):  # each client by its examples
                return -float((losses["value"] * losses["weight"]).sum() / losses["weight"].sum())
        raise DataError(f"no client reports one of {', '.join(_ROUND_LOSSES)}")


def _backend(exp: ExperimentBase) -> Backend:
    """Drives a run in this process; its client actors, if any, take the bundles of this trial."""
    if exp.engine.backend == "serial":
        return run_serial
    from actors.metrics import counting_commits
    from actors.ray_pool import RayPool

    def drive(
        entry: str, payload: Mapping[str, Any], _: EngineConfig, on_event: OnEvent, should_stop: Callable[[], bool]
    ) -> None:
        run = str(payload["run_id"])
        resolve(entry)(payload, partial(RayPool, run=run), counting_commits(on_event, run), should_stop)

    return drive
