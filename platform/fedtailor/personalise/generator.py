"""The trained strategy generator of a run, and the base model that it was trained for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedtailor.core.config import merge_layers, validate
from fedtailor.core.errors import ConfigError, ModelError, StorageError
from fedtailor.core.messages import FloatArray
from fedtailor.core.settings import ModelConfig
from fedtailor.experiment.config import ExperimentBase, method_section, to_json
from fedtailor.experiment.launch import load_experiment
from fedtailor.methods.fedp2eft import FedP2EFTConfig
from fedtailor.models import hub
from fedtailor.models.dimensions import dimensions
from fedtailor.models.folder import check_folder
from fedtailor.models.load import load_config
from fedtailor.models.source import ModelSource
from fedtailor.storage.artifacts import fetch, model_path, published
from fedtailor.storage.digest import DONE
from fedtailor.storage.round_store import SERVER, SHARED
from fedtailor.storage.run_folder import RunFolder
from fedtailor.training.finetune import FinetuneConfig

METHOD = "fedp2eft"


@dataclass(frozen=True)
class TrainedGenerator:
    """What a finished strategy stage left behind; no weights of the base are read for it.

    Args:
        run: the run's folder.
        stage: the strategy stage's entry in it.
        exp: the run's configuration.
        cfg: the method's, with another fine-tuning where that was asked for.
        modules: full paths of the L adapted layers, in order.
        labels: class names in the order of their ids.
        base: folder of the base model, absolute.
        shared: the generator's parameters by name.
        server: state of the server optimizer beside them.
    """

    run: RunFolder
    stage: Mapping[str, Any]
    exp: ExperimentBase
    cfg: FedP2EFTConfig
    modules: tuple[str, ...]
    labels: tuple[str, ...]
    base: Path
    shared: Mapping[str, FloatArray]
    server: Mapping[str, FloatArray]

    @property
    def seed(self) -> int:
        """Seed of the run that the stage is of; also names the random streams of personalising."""
        return int(self.stage["seed"])


def open_generator(
    run: RunFolder, seed: int | None, budget: int, base: Path | None = None, overrides: Sequence[str] = ()
) -> TrainedGenerator:
    """Opens a run's generator.

    Args:
        run: the run's folder.
        seed: default: the run's first.
        budget: r that is asked for.
        base: another copy of the base model; default: the one in the run.
        overrides: ``key=value`` settings of ``fedp2eft.finetune``, with or without that prefix.

    Raises:
        ConfigError: no FedP2EFT in the run, no such seed, a budget that the generator does not serve, or every problem
            of the overrides.
        StorageError: its strategy stage is not finished, or its base model is gone.
        ModelError: a base folder that is incomplete.
    """
    exp = load_experiment(run)
    seed = exp.seeds[0] if seed is None else seed
    _refuse_unserved(run.run_id, exp, seed, budget)
    cfg = method_section(exp, METHOD)
    assert isinstance(cfg, FedP2EFTConfig)
    words = [word.removeprefix("fedp2eft.").removeprefix("finetune.") for word in overrides]
    finetune = validate(FinetuneConfig, merge_layers([to_json(cfg.finetune)], words))
    stage = next((s for s in run.stages("strategy") if (s["method"], s["seed"]) == (METHOD, seed)), None)
    again = f"fedtailor resume {run.run_id}"
    if stage is None:
        raise StorageError(f"run '{run.run_id}' has not got to its strategy stage; {again}")
    finished = f"artifacts/{stage['artifact']}/{DONE}"
    if not run.storage.exists(finished):
        done = len(run.log(stage).all(objects=False))
        raise StorageError(
            f"run '{run.run_id}' has not finished {stage['key']}: {done} of {stage['rounds']} rounds; {again}"
        )
    commit = run.log(stage).newest(repair=False)
    if commit is None:
        raise StorageError(f"run '{run.run_id}': {stage['key']} has no rounds, so its generator was never trained")
    folder = base.expanduser() if base is not None else model_of(run, stage["parent"])
    check_folder(folder, exp.task.max_length)
    return TrainedGenerator(
        run=run,
        stage=stage,
        exp=exp,
        cfg=cfg.model_copy(update={"finetune": finetune}),
        modules=tuple(run.storage.read_json(finished)["modules"]),
        labels=labels_of(folder),
        base=folder.resolve(),
        shared=commit.tensors(SHARED),
        server=commit.tensors(SERVER) if SERVER in commit.objects else {},
    )


def model_of(run: RunFolder, artifact: str) -> Path:
    """The frozen model that stages of a run build on; of a remote storage, this node's copy.

    Args:
        run: the run's folder.
        artifact: the base stage's, or the initial model's: the ``parent`` of those stages.

    Raises:
        StorageError: it is not there.
    """
    path = model_path(artifact)
    if not published(run.storage, path):
        raise StorageError(
            f"run '{run.run_id}': its base model is not in {run.storage.full(path)}: not finished yet, or deleted; "
            f"fedtailor resume {run.run_id}"
        )
    return fetch(run.storage, path)


def labels_of(folder: Path) -> tuple[str, ...]:
    """Class names of a model's head, in the order of their ids."""
    return tuple(str(name) for _, name in sorted(dict(load_config(folder).id2label or {}).items()))


def checked_fingerprint(generator: TrainedGenerator) -> str:
    """The base model's fingerprint, after a comparison with what the generator was trained for.

    Raises:
        ModelError: other adapted layers, or other files than those of the run's base model; names both.
        StorageError: the run's base model is gone, so that another folder cannot be compared with it.
    """
    base, modules, run = generator.base, generator.modules, generator.run
    other = f"{base} is not the base model of run '{run.run_id}'"
    cfg = ModelConfig(name="base", path=str(base), targets=generator.exp.model.targets)
    here = tuple(name for name, _, _ in dimensions(cfg, len(generator.labels), generator.exp.task.max_length).linears)
    if here != modules:
        mine, its = next((a, b) for a, b in zip_longest(here, modules, fillvalue="nothing") if a != b)
        raise ModelError(
            f"{other}: it has {len(here)} layers to adapt, the generator was trained for {len(modules)} layers; "
            f"the first difference is {mine} against {its}"
        )
    fingerprint = _fingerprint(base)
    own = model_of(run, generator.stage["parent"]).resolve()
    if own != base and (expected := _fingerprint(own)) != fingerprint:
        raise ModelError(
            f"{other}: its fingerprint is {fingerprint}, the generator was trained for {expected} (in {own})"
        )
    return fingerprint


def _fingerprint(folder: Path) -> str:
    return hub.fingerprint(ModelSource("folder", folder.name, str(folder)))


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
