"""The trained strategy generator of a run, and the base model that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtailor.core.errors import ConfigError, ModelError, StorageError
from fedtailor.core.messages import FloatArray
from fedtailor.core.settings import ModelConfig
from fedtailor.experiment.config import ExperimentBase, method_section
from fedtailor.experiment.launch import load_experiment
from fedtailor.methods.fedp2eft import FedP2EFTConfig
from fedtailor.models import hub
from fedtailor.models.dimensions import dimensions
from fedtailor.models.folder import check_folder
from fedtailor.models.load import load_config
from fedtailor.models.source import ModelSource
from fedtailor.storage.artifacts import fetch, model_path, published
from fedtailor.storage.digest import DONE
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import SERVER, SHARED
from fedtailor.storage.run_folder import RunFolder

METHOD = "fedp2eft"


@dataclass(frozen=True)
class TrainedGenerator:
    """What a finished strategy stage left behind; no weights of the base are read for it.

    Args:
        run_id: the run.
        seed: of the run; also names the random streams of personalising.
        artifact: the strategy stage's artifact.
        exp: the run's configuration.
        modules: full paths of the L adapted layers, in order.
        labels: class names in the order of their ids.
        base: folder of the base model, absolute.
        shared: the generator's parameters by name.
        server: state of the server optimizer beside them.
    """

    run_id: str
    seed: int
    artifact: str
    exp: ExperimentBase
    modules: tuple[str, ...]
    labels: tuple[str, ...]
    base: Path
    shared: Mapping[str, FloatArray]
    server: Mapping[str, FloatArray]

    @property
    def cfg(self) -> FedP2EFTConfig:
        """The method's configuration in the run."""
        section = method_section(self.exp, METHOD)
        assert isinstance(section, FedP2EFTConfig)
        return section


def open_generator(storage: Storage, run_id: str, seed: int | None, budget: int, base: Path | None) -> TrainedGenerator:
    """Opens a run's generator.

    Args:
        storage: where the run is.
        run_id: the run.
        seed: default: the run's first.
        budget: r that is asked for.
        base: another copy of the base model; default: the one in the run.

    Raises:
        ConfigError: no FedP2EFT in the run, no such seed, or a budget that the generator does not serve.
        StorageError: no such run, its strategy stage is not finished, or its base model is gone.
        ModelError: a base folder that is incomplete.
    """
    run = RunFolder.open(storage, run_id)
    exp = load_experiment(run)
    seed = exp.seeds[0] if seed is None else seed
    _refuse_unserved(run_id, exp, seed, budget)
    stage = _finished_stage(run, seed)
    done = storage.read_json(f"artifacts/{stage['artifact']}/{DONE}")
    commit = run.log(stage).newest(repair=False)
    if commit is None:
        raise StorageError(f"run '{run_id}': {stage['key']} has no rounds, so its generator was never trained")
    folder = base.expanduser() if base is not None else _base_of(run, stage)
    check_folder(folder, exp.task.max_length)
    names = dict(load_config(folder).id2label or {})
    return TrainedGenerator(
        run_id=run_id,
        seed=seed,
        artifact=str(stage["artifact"]),
        exp=exp,
        modules=tuple(done["modules"]),
        labels=tuple(str(name) for _, name in sorted(names.items())),
        base=folder.resolve(),
        shared=commit.tensors(SHARED),
        server=commit.tensors(SERVER) if SERVER in commit.objects else {},
    )


def checked_fingerprint(storage: Storage, generator: TrainedGenerator) -> str:
    """The base model's fingerprint, after a comparison with what the generator was trained for.

    Raises:
        ModelError: other adapted layers, or other files than those of the run's base model; names both.
        StorageError: the run's base model is gone, so that another folder cannot be compared with it.
    """
    cfg = ModelConfig(name="base", path=str(generator.base), targets=generator.exp.model.targets)
    here = tuple(name for name, _, _ in dimensions(cfg, len(generator.labels), generator.exp.task.max_length).linears)
    other = f"{generator.base} is not the base model of run '{generator.run_id}'"
    if here != generator.modules:
        raise ModelError(
            f"{other}: it has {len(here)} layers to adapt, the generator was trained for {len(generator.modules)} "
            f"layers{_first_difference(here, generator.modules)}"
        )
    fingerprint = _fingerprint(generator.base)
    run = RunFolder.open(storage, generator.run_id)
    own = _base_of(run, _finished_stage(run, generator.seed)).resolve()
    if own != generator.base and (expected := _fingerprint(own)) != fingerprint:
        raise ModelError(
            f"{other}: its fingerprint is {fingerprint}, the generator was trained for {expected} (in {own})"
        )
    return fingerprint


def _refuse_unserved(run_id: str, exp: ExperimentBase, seed: int, budget: int) -> None:
    if exp.task_entry.kind != "classification":
        raise ConfigError(
            f"run '{run_id}' is of task '{exp.task.name}': a new client brings texts and classes, so only runs of "
            "classification tasks can serve it"
        )
    if METHOD not in exp.methods:
        raise ConfigError(
            f"run '{run_id}' has no strategy generator: its methods are {', '.join(exp.methods)}; "
            f"'{METHOD}' must be one of them"
        )
    problems = []
    if seed not in exp.seeds:
        problems.append(f"--seed {seed}: not in run '{run_id}' (it has: {', '.join(map(str, exp.seeds))})")
    if not 1 <= budget <= exp.r_max:
        problems.append(
            f"--budget {budget}: the generator of run '{run_id}' was trained for budgets up to r_max = {exp.r_max} "
            f"(allowed: 1 ... {exp.r_max})"
        )
    if problems:
        raise ConfigError(problems)


def _finished_stage(run: RunFolder, seed: int) -> dict[str, Any]:
    stages = [s for s in run.stages("strategy") if s["method"] == METHOD and s["seed"] == seed]
    if not stages:
        raise StorageError(f"run '{run.run_id}' has not got to its strategy stage; fedtailor resume {run.run_id}")
    [stage] = stages
    if not run.storage.exists(f"artifacts/{stage['artifact']}/{DONE}"):
        done = len(run.log(stage).all(objects=False))
        raise StorageError(
            f"run '{run.run_id}' has not finished {stage['key']}: {done} of {stage['rounds']} rounds; "
            f"fedtailor resume {run.run_id}"
        )
    return stage


def _base_of(run: RunFolder, stage: Mapping[str, Any]) -> Path:
    """The folder that the strategy stage took its frozen model from."""
    path = model_path(str(stage["parent"]))
    if not published(run.storage, path):
        raise StorageError(f"run '{run.run_id}': its base model is not in {run.storage.full(path)} any more")
    return fetch(run.storage, path)


def _fingerprint(folder: Path) -> str:
    return hub.fingerprint(ModelSource("folder", folder.name, str(folder)))


def _first_difference(here: Sequence[str], there: Sequence[str]) -> str:
    for a, b in zip(here, there, strict=False):
        if a != b:
            return f"; the first difference is {a} against {b}"
    longer = here if len(here) > len(there) else there
    return f"; only one of them has {longer[min(len(here), len(there))]}"
