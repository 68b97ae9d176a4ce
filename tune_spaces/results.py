"""What a sweep leaves: ``STORAGE/<sweep id>/sweep.json`` with every trial, and the best values as a preset file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final, Literal

import yaml

from fedtailor.core.errors import StorageError
from fedtailor.core.overrides import merge_layers
from fedtailor.storage.files import Storage, join
from fedtailor.storage.provenance import redact
from fedtailor.storage.run_folder import RunFolder, committed_stages
from tune_spaces.grid import Value, score
from tune_spaces.plan import SweepPlan

SCHEMA: Final = 1
RECORD, BEST, TUNE = "sweep.json", "best.yaml", "tune"
"""Files of a sweep's folder; ``tune/`` is Ray Tune's own, written and read by Ray only."""

State = Literal["complete", "stopped", "failed", "unfinished"]
STOPPED: Final = "stopped early: hopeless beside the other trials (ASHA)"


@dataclass(frozen=True)
class Trial:
    """A trial's place in the result.

    Args:
        number: the trial's number, from 0.
        run_id: its run.
        values: searched values.
        state: ``stopped`` means on purpose, by ASHA.
        value: the objective, of complete trials only.
        message: why it is not complete.
    """

    number: int
    run_id: str
    values: Mapping[str, Value]
    state: State
    value: float | None = None
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """A sweep's result so far.

    Args:
        plan: the sweep.
        trials: all of them, by number.
        reference: the objective of the base model itself, None while not known.
    """

    plan: SweepPlan
    trials: Sequence[Trial]
    reference: float | None

    @property
    def best(self) -> Trial | None:
        """The complete trial with the best value; of equal ones the paper's choice, else the first."""
        done = [(trial, self.plan.judged.better(trial.value)) for trial in self.trials if trial.value is not None]
        picked = self.plan.picked
        return max(done, key=lambda pair: (pair[1], dict(pair[0].values) == picked))[0] if done else None

    @property
    def flat(self) -> bool:
        """Whether several trials are complete and all of them equal."""
        values = [trial.value for trial in self.trials if trial.value is not None]
        return len(values) > 1 and len(set(values)) == 1

    def of_state(self, state: State) -> list[Trial]:
        """Trials in one state."""
        return [trial for trial in self.trials if trial.state == state]


def refuse_other(storage: Storage, plan: SweepPlan) -> None:
    """Refuses a name that belongs to something else.

    Raises:
        StorageError: names what differs.
    """
    path = join(plan.sweep_id, RECORD)
    if not storage.exists(path):
        if storage.exists(plan.sweep_id):
            raise StorageError(f"{storage.full(plan.sweep_id)} exists and is no sweep; choose another --sweep-id")
        return
    there = storage.read_json(path)
    if there.get("schema") != SCHEMA:
        raise StorageError(f"{storage.full(path)} has schema {there.get('schema')}, this version reads {SCHEMA}")
    new = json.loads(json.dumps(redact(plan.identity())))
    differing = [key for key in new if there["identity"].get(key) != new[key]]
    if differing:
        raise StorageError(
            f"sweep '{plan.sweep_id}' belongs to another search (differs in {', '.join(differing)}); "
            "choose another --sweep-id"
        )


def begin_record(storage: Storage, plan: SweepPlan) -> None:
    """Writes the record of a sweep whose trials all wait, unless there is one."""
    if not storage.exists(join(plan.sweep_id, RECORD)):
        write_record(storage, examine(storage, plan, [], {}))


def base_is_there(storage: Storage, plan: SweepPlan) -> bool:
    """Whether what all trials share is trained and scored."""
    found = storage.exists(join(plan.base_run, "run.json"))
    return found and is_complete(RunFolder.open(storage, plan.base_run))


def settled(storage: Storage, plan: SweepPlan) -> Outcome | None:
    """The outcome, if nothing is left to run: all trials complete or stopped on purpose."""
    path = join(plan.sweep_id, RECORD)
    trials = storage.read_json(path)["trials"] if storage.exists(path) else []
    if not trials or any(trial["state"] not in ("complete", "stopped") for trial in trials):
        return None
    outcome = examine(storage, plan, [t["number"] for t in trials if t["state"] == "stopped"], {})
    return None if outcome.of_state("unfinished") else outcome


def examine(storage: Storage, plan: SweepPlan, stopped: Sequence[int], errors: Mapping[int, str]) -> Outcome:
    """Reads every trial's run.

    Args:
        storage: storage of the runs.
        plan: the sweep.
        stopped: trials that ASHA stopped; what their runs say is brought in step.
        errors: what Tune says of trials that failed.
    """
    trials = [_examined(storage, plan, number, number in stopped, errors) for number in range(len(plan.trials))]
    reference = None
    if base_is_there(storage, plan):
        metrics = RunFolder.open(storage, plan.base_run).metrics("personalise")
        reference = score(metrics, "base", plan.judged)
    return Outcome(plan, trials, reference)


def is_complete(run: RunFolder) -> bool:
    """Whether everything that was asked of a run is committed."""
    stages = committed_stages(run)
    return run.status()["state"] == "complete" and bool(stages) and all(stage["done"] for stage in stages)


def value_of(plan: SweepPlan, run: RunFolder) -> float:
    """The objective of a trial, from what it has committed so far.

    Raises:
        DataError: no client that counts is committed.
    """
    return score(run.metrics("personalise"), plan.grid.method, plan.judged)


def _examined(storage: Storage, plan: SweepPlan, number: int, stopped: bool, errors: Mapping[int, str]) -> Trial:
    trial = Trial(number, plan.run_id(number), plan.trials[number], "unfinished")
    if not storage.exists(join(trial.run_id, "run.json")):
        return replace(trial, state="failed", message=errors[number]) if number in errors else trial
    run = RunFolder.open(storage, trial.run_id)
    if is_complete(run):
        return replace(trial, state="complete", value=value_of(plan, run))
    status = run.status()
    if stopped:
        run.set_status("interrupted", STOPPED)
        return replace(trial, state="stopped", message=STOPPED)
    if number in errors:
        reason = status["message"] if status["state"] == "failed" and status["message"] else errors[number]
        return replace(trial, state="failed", message=reason)
    if status["state"] == "running":
        run.set_status("interrupted", "the sweep was stopped")
    return trial


def write_record(storage: Storage, outcome: Outcome) -> None:
    """Writes ``sweep.json`` and, once a trial is complete, ``best.yaml``."""
    plan, best = outcome.plan, outcome.best
    content = {
        "schema": SCHEMA, "sweep_id": plan.sweep_id, "says": plan.grid.source, "words": list(plan.words),
        "identity": plan.identity(), "mode": plan.judged.mode, "base_run": plan.base_run,
        "reference": outcome.reference, "trials": [asdict(trial) for trial in outcome.trials],
        "best": None if best is None else asdict(best),
    }  # fmt: skip
    storage.write_json(join(plan.sweep_id, RECORD), redact(content))
    if best is not None and best.value is not None:
        storage.write_bytes(join(plan.sweep_id, BEST), best_preset(plan, best.values, best.value).encode())


def best_preset(plan: SweepPlan, values: Mapping[str, Value], reached: float) -> str:
    """The best values as a preset: a layer for any configuration, since a search is often made on another one."""
    tree = merge_layers([], [f"{key}={value!r}" for key, value in values.items()])
    return (
        f"# Best of {len(plan.trials)} trials of {plan.address} ({plan.sweep_id}): {plan.objective} "
        f"{plan.judged.shown(reached, unit=True)}.\n{yaml.safe_dump(tree, sort_keys=False)}"
    )
