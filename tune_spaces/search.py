"""Ray Tune over the grid: one placement group per trial, taken up again where it was left.

At Ctrl-C or SIGTERM Tune writes its state and ends; a second signal ends at once.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ray import tune
from ray.tune.logger import JsonLoggerCallback
from ray.tune.schedulers import ASHAScheduler

from actors.client_actor import forwarded_environment
from actors.placement import ActorPlan
from fedtailor.core.errors import Interrupted, StorageError
from fedtailor.tracking.progress import LINE_EVERY_S
from tune_spaces.plan import SweepPlan, steps_of
from tune_spaces.results import TUNE
from tune_spaces.trial import play

RETRIES: Final = 2
"""How often a trial whose process died is started again; it goes on from its last commit."""

REDUCTION: Final = 3
"""ASHA keeps one in so many trials at every rung."""

_ENVIRONMENT: Final = {
    "RAY_AIR_NEW_OUTPUT": "0",  # with `verbose=0`: silence; the new output prints boxes all the same
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # CSV and TensorBoard would repeat what is committed
    "TUNE_GLOBAL_CHECKPOINT_S": "2",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}

Listener = Callable[[str, Any, Mapping[str, Any]], None]

_OURS = (signal.SIGINT, signal.SIGTERM)

_TUNES = signal.SIGUSR1
"""What Tune takes for the wish to end in order, however it is configured."""

_listener: Listener | None = None
"""Tune pickles its callbacks and reads them back when it restores, so the callback can hold no console."""


@dataclass(frozen=True)
class Found:
    """How Tune left the trials.

    Args:
        stopped: numbers of the trials that ASHA stopped.
        errors: number to what went wrong.
    """

    stopped: tuple[int, ...]
    errors: Mapping[int, str]


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


def search(
    plan: SweepPlan, folder: Path, actors: ActorPlan, at_once: int | None, show: Callable[[dict[str, Any]], None]
) -> Found:
    """Runs what is missing of all trials; returns when all are over, or when Tune was asked to end.

    Args:
        plan: the sweep.
        folder: the sweep's folder; ``tune/`` below it is Tune's.
        actors: workers of one trial.
        at_once: most trials at a time; None: as many as fit. Fixed when a sweep starts first.
        show: receives events of the kind ``trial``.
    """
    os.environ.update(_ENVIRONMENT)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    group = tune.PlacementGroupFactory(bundles(actors, plan.config["engine"]["backend"] == "serial"))
    place = {"environment": forwarded_environment(), "folder": os.getcwd()}
    trainable = tune.with_resources(tune.with_parameters(play, plan=plan, place=place), group)
    with _listening(_TrialNotes(plan, show)):
        results = _tuner(plan, folder, trainable, at_once).fit()
    return _found(plan, results)


def _tuner(plan: SweepPlan, folder: Path, trainable: Any, at_once: int | None) -> Any:
    own = folder / TUNE
    if tune.Tuner.can_restore(str(own)) and any(own.glob("experiment_state-*.json")):
        return tune.Tuner.restore(str(own), trainable, resume_unfinished=True, restart_errored=True)
    if own.exists():  # killed before Tune had written its first state: no trial has a run that it could lose
        shutil.rmtree(own)
    return tune.Tuner(
        trainable,
        param_space={key: tune.grid_search(list(values)) for key, values in plan.grid.space.items()},
        # A process that has played one trial plays the next: starting one costs as much as a small trial.
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once, scheduler=_scheduler(plan), reuse_actors=True),
        run_config=tune.RunConfig(
            name=TUNE,
            storage_path=str(folder),
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[_Callback(), JsonLoggerCallback()],  # type: ignore[no-untyped-call]
            verbose=0,
        ),
    )


def _scheduler(plan: SweepPlan) -> ASHAScheduler | None:
    if not plan.asha:
        return None
    total = steps_total(plan)
    grace = max(1, total // REDUCTION**2)
    # One more than there are steps: a trial that has done them all is not stopped but done.
    return ASHAScheduler(
        time_attr="step", metric="progress", mode="max", max_t=total + 1, grace_period=grace,
        reduction_factor=REDUCTION,
    )  # fmt: skip


def steps_total(plan: SweepPlan) -> int:
    """Steps of one trial, before any of its stages is planned: as `trial.Watch` counts them, at the most."""
    from fedtailor.experiment.config import method_section, scaled
    from fedtailor.methods import build_method

    exp = plan.experiment(0)
    method = build_method(plan.grid.method, method_section(exp, plan.grid.method), exp.r_max)
    rounds = scaled(exp.strategy.rounds, exp.scale) if method.local_update is not None else 0
    stages: list[dict[str, Any]] = []
    for part in range(len(exp.seeds) * (len(exp.budgets) if method.per_budget and rounds else 1)):
        stages += [{"key": f"strategy/{part}", "kind": "strategy", "rounds": rounds}] if rounds else []
        stages += [{"key": f"personalise/{part}", "kind": "personalise", "rounds": 0}]
    return sum(count for _, count in steps_of(stages, plan.chunks()).values())


def _found(plan: SweepPlan, results: Any) -> Found:
    stopped, errors = [], {}
    for result in results:
        if result.config is None:  # asked to end before it had started
            continue
        number = plan.number(result.config)
        if result.error is not None:
            errors[number] = str(result.error).strip().split("\n")[-1]
        elif not (result.metrics or {}).get("finished"):
            stopped.append(number)
    if len(results) > len(plan.trials):
        raise StorageError(f"Tune knows {len(results)} trials of {plan.sweep_id}, the grid has {len(plan.trials)}")
    return Found(tuple(stopped), errors)


class _TrialNotes:
    """Turns what happens to trials into events of the kind ``trial``."""

    def __init__(self, plan: SweepPlan, show: Callable[[dict[str, Any]], None]) -> None:
        self._plan, self._show = plan, show
        self._said: dict[int, float] = {}

    def __call__(self, what: str, trial: Any, last: Mapping[str, Any]) -> None:
        number = self._plan.number(trial.config)
        if what == "step":
            if last.get("finished") or time.monotonic() - self._said.get(number, 0.0) < LINE_EVERY_S:
                return
            state = f"step {last.get('step')}"
        elif what == "over" and last.get("finished"):
            judged = self._plan.judged
            state = f"done, {self._plan.objective} {judged.shown(last['value'])}{' %' if judged.share else ''}"
        elif what == "over":
            state = f"stopped early by ASHA at step {last.get('step')}"
        else:
            state = what
        self._said[number] = time.monotonic()
        values = ", ".join(f"{key}={value:g}" for key, value in self._plan.trials[number].items())
        text = f"trial {self._plan.run_id(number)} ({values})  {state}"
        self._show({"kind": "trial", "run": self._plan.run_id(number), "what": what, "text": text})


@contextmanager
def _listening(listener: Listener) -> Iterator[None]:
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


class _Callback(tune.Callback):
    """Hands what happens to trials to the listener of this process."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say("started", trial)

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: Any, **info: Any) -> None:
        _say("step", trial, result)  # not yet the trial's last result

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say("over", trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say("failed", trial)

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        _say("was lost and starts again at its last commit", trial)


def _say(what: str, trial: Any, result: Mapping[str, Any] | None = None) -> None:
    if _listener is not None:
        _listener(what, trial, result or trial.last_result or {})


@dataclass
class TuneSignals:
    """``with TuneSignals(tell) as signals: tuner.fit(); signals.number``.

    Tune's own handler knows SIGINT only and hides which signal came, so it is turned off.

    Args:
        tell: shows a sentence when the first signal comes.
        number: the first signal that came.
    """

    tell: Callable[[str], None]
    number: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> TuneSignals:
        """Takes over the signals."""
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        self._before = {number: signal.getsignal(number) for number in (*_OURS, _TUNES)}
        for number in _OURS:
            signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Ends with the signal's exit code if one came.

        Raises:
            Interrupted: 130 for Ctrl-C, 143 for SIGTERM.
        """
        if self.number is not None:
            raise self._ended("stopped: what is committed is kept")

    def _received(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if first and signal.getsignal(_TUNES) != self._before[_TUNES]:
            self.tell("stopping: the trials end at their last commit; once more (Ctrl-C) stops at once")
            signal.raise_signal(_TUNES)
            return
        raise self._ended("stopped at once: what is committed is kept")

    def _ended(self, text: str) -> Interrupted:
        error = Interrupted(text)
        error.exit_code = 128 + (self.number or signal.SIGINT)
        return error
