"""What a finished run has for a client that it never saw: a method, what its rounds trained, and the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedtailor.adapters.lora import AdapterPair, LoraAdapter
from fedtailor.core.config import Config, validate
from fedtailor.core.errors import ConfigError, ModelError, StorageError, did_you_mean
from fedtailor.core.messages import Row, StageInfo, StageSpec
from fedtailor.core.overrides import merge_layers
from fedtailor.experiment.config import ExperimentBase, method_of, method_section, to_json
from fedtailor.experiment.launch import load_experiment
from fedtailor.experiment.stages import Stage, stage_spec
from fedtailor.federated.method import Method, best_of
from fedtailor.methods import METHODS
from fedtailor.models import hub
from fedtailor.models.folder import check_folder
from fedtailor.models.load import load_config
from fedtailor.models.source import ModelSource
from fedtailor.storage.artifacts import fetch, model_path, published
from fedtailor.storage.commit import Commit
from fedtailor.storage.round_store import SERVER, SHARED, flatten
from fedtailor.storage.run_folder import DONE, RunFolder
from fedtailor.training.finetune import FinetuneConfig

USUAL = "fedp2eft"
"""The method where none is asked for and the run has it."""


@dataclass(frozen=True)
class TrainedMethod:
    """A method of a run as it is used for a new client; no weights are read for it.

    Args:
        run: the run's folder.
        exp: the run's configuration.
        stage: the method's personalising stage, at the one budget that is asked for.
        settings: the method's section, with what was overridden.
        base: folder of the base model, absolute.
        fingerprint: of that folder.
        labels: class names in the order of their ids; none of models that answer.
        rounds: newest commit of the method's rounds; None: it has no rounds.
    """

    run: RunFolder
    exp: ExperimentBase
    stage: Stage
    settings: Config
    base: Path
    fingerprint: str
    labels: tuple[str, ...]
    rounds: Commit | None

    @property
    def answers(self) -> bool:
        """Whether the run's models answer with text."""
        return self.exp.task_entry.kind == "generation"

    @property
    def budget(self) -> int:
        """What the client gets, r."""
        return self.stage.budgets[0]

    @property
    def finetune(self) -> Config:
        """The settings that a new client may override."""
        return _tunable(self.settings)

    def spec(self, method: str, data: Path, device: str) -> StageSpec:
        """What a worker is told, as in the run, but for the place of the data and the device.

        Args:
            method: this one, or one without rounds to compare with.
            data: folder of the tokenised client.
            device: ``cpu`` or ``cuda``.
        """
        stage = replace(self.stage, method=method)
        spec = stage_spec(self.exp, stage, str(self.base), str(data), None)
        settings = self.settings if method == self.stage.method else method_section(self.exp, method)
        engine = {"num_gpus": float(device == "cuda"), "memory_gb": None}
        return replace(
            spec,
            method_config=to_json(settings),
            engine=spec.engine.model_copy(update=engine),
            personalise=spec.personalise.model_copy(update={"save_predictions": self.answers}),
            save_adapters=True,
        )

    def shared(self, info: StageInfo) -> Row | None:
        """SHARED parameters (P,) that the rounds trained; None without any.

        Raises:
            StorageError: they are not those that the method has on this base.
        """
        if self.rounds is None or not info.shared:
            return None
        server = self.rounds.tensors(SERVER) if SERVER in self.rounds.objects else {}
        return best_of(server, flatten(info.shared, self.rounds.tensors(SHARED)))


def open_method(
    run: RunFolder,
    method: str | None = None,
    budget: int | None = None,
    seed: int | None = None,
    base: Path | None = None,
    overrides: Sequence[str] = (),
) -> TrainedMethod:
    """Opens what a run has for a new client.

    Args:
        run: the run's folder.
        method: one of the run's; default: `USUAL`, else the last one with trained SHARED parameters, else the last.
        budget: r; default: the largest that the run has.
        seed: default: the run's first.
        base: another copy of the base model; default: the one in the run.
        overrides: ``key=value`` settings of the fine-tuning, with or without the method's name in front.

    Raises:
        ConfigError: no such method or seed in the run, a method that gives a client no adapter, a budget that it does
            not serve, or every problem of the overrides.
        StorageError: its rounds are not finished, or its base model is gone.
        ModelError: a base folder that is incomplete, or another model than the run's.
    """
    exp = load_experiment(run)
    if exp.task_entry.kind == "regression":
        raise ConfigError(
            f"run '{run.run_id}' fits made-up numbers ('task.name' = {exp.task.name}): no client can join"
        )
    if exp.task_entry.kind == "extraction":
        raise ConfigError(f"run '{run.run_id}' marks spans ('task.name' = {exp.task.name}): no client can join yet")
    name = chosen_method(run.run_id, exp, method)
    built = method_of(exp, name)
    common = common_lora(built)
    seed = exp.seeds[0] if seed is None else seed
    budget = budget if budget is not None else common.rank if common else exp.budgets[-1]
    _refuse_unserved(run.run_id, exp, built, seed, budget)
    settings = _overridden(exp, built, overrides)
    stage = _stage(run, exp, built, seed, budget)
    rounds = None if stage.strategy is None else _trained(run, stage.strategy)
    folder, fingerprint = _base(run, exp, stage.parent, base)
    labels = labels_of(folder) if exp.task_entry.kind == "classification" else ()
    return TrainedMethod(run, exp, stage, settings, folder, fingerprint, labels, rounds)


def common_lora(method: Method) -> LoraAdapter | None:
    """The one LoRA that all clients of a method use as it is; None where each client gets its own."""
    if method.personaliser.budgeted:
        return None
    part = method.adapter.first if isinstance(method.adapter, AdapterPair) else method.adapter
    return part if isinstance(part, LoraAdapter) else None


def no_adapter(exp: ExperimentBase, name: str) -> str | None:
    """Why a method gives a client no adapter; None: it gives one."""
    method = method_of(exp, name)
    common = common_lora(method)
    if method.personaliser.budgeted:
        return None
    if method.adapter is None:
        return "trains nothing"
    if not method.adapter_is_model:
        return "changes more than an adapter can hold"
    return None if common is not None else "trains the base's own weights, which are no adapter"


def chosen_method(run_id: str, exp: ExperimentBase, asked: str | None) -> str:
    """The method that is asked for, or the usual one; see `open_method`."""
    able = [name for name in exp.methods if no_adapter(exp, name) is None]
    if asked is None and able:
        trained = [name for name in able if method_of(exp, name).local_update is not None]
        return USUAL if USUAL in able else (trained or able)[-1]
    if asked in able:
        return asked
    have = f"those of run '{run_id}' that give a client an adapter: {', '.join(able) or 'none'}"
    if asked is None:
        others = ", ".join(name for name in METHODS if name not in exp.methods and no_adapter(exp, name) is None)
        raise ConfigError(
            f"no method of run '{run_id}' ({', '.join(exp.methods)}) gives a client an adapter; run it with one of "
            f"{others}"
        )
    if asked not in exp.methods:
        raise ConfigError(f"--method {asked}: not in run '{run_id}'{did_you_mean(asked, exp.methods)} ({have})")
    raise ConfigError(f"--method {asked}: it {no_adapter(exp, asked)} ({have})")


def _refuse_unserved(run_id: str, exp: ExperimentBase, method: Method, seed: int, budget: int) -> None:
    problems, who = [], f"{method.name} of run '{run_id}'"
    if seed not in exp.seeds:
        problems.append(f"--seed {seed}: not in run '{run_id}' (it has: {', '.join(map(str, exp.seeds))})")
    common = common_lora(method)
    if common is not None and budget != common.rank:
        problems.append(f"--budget {budget}: all clients use the one LoRA of {who} (allowed: {common.rank})")
    elif common is None and _apart(method) and budget not in exp.budgets:
        allowed = ", ".join(map(str, exp.budgets))
        problems.append(f"--budget {budget}: {who} was trained for each budget by itself (allowed: {allowed})")
    elif common is None and not 1 <= budget <= exp.r_max:
        problems.append(
            f"--budget {budget}: {who} serves budgets up to r_max = {exp.r_max} (allowed: 1 ... {exp.r_max})"
        )
    if problems:
        raise ConfigError(problems)


def _apart(method: Method) -> bool:
    return method.per_budget and method.local_update is not None


def _tunable(settings: Config) -> Config:
    return inner if isinstance(inner := getattr(settings, "finetune", None), FinetuneConfig) else settings


def _overridden(exp: ExperimentBase, method: Method, overrides: Sequence[str]) -> Config:
    settings = method_section(exp, method.name)
    if not overrides:
        return settings
    if common_lora(method) is not None:
        raise ConfigError(f"{' '.join(overrides)}: {method.name} trains nothing on a new client, so nothing can be set")
    words = [word.removeprefix(f"{method.name}.").removeprefix("finetune.") for word in overrides]
    before = _tunable(settings)
    after = validate(type(before), merge_layers([to_json(before)], words))
    return after if before is settings else settings.model_copy(update={"finetune": after})


def _stage(run: RunFolder, exp: ExperimentBase, method: Method, seed: int, budget: int) -> Stage:
    entry = personal_stage(run, method.name, seed, budget if _apart(method) else None)
    known: dict[str, Any] = {key: entry[key] for key in ("key", "kind", "artifact", "parent", "strategy")}
    r_max = budget if _apart(method) else exp.r_max
    return Stage(method=method.name, seed=seed, budgets=(budget,), r_max=r_max, **known)


def personal_stage(run: RunFolder, method: str, seed: int, budget: int | None) -> Mapping[str, Any]:
    """The personalising stage of a method that served ``budget``; None: any.

    Raises:
        StorageError: the run has not got that far.
    """
    for stage in run.stages("personalise"):
        # A run folder that says no budgets is from before stages could have some of them only.
        serves = budget is None or budget in stage.get("budgets", [budget])
        if (stage["method"], stage["seed"]) == (method, seed) and serves:
            return stage
    raise StorageError(f"run '{run.run_id}' has not got that far; fedtailor resume {run.run_id}")


def _trained(run: RunFolder, artifact: str) -> Commit:
    """The newest round of a finished strategy stage."""
    stage = next(stage for stage in run.stages("strategy") if stage["artifact"] == artifact)
    if not run.storage.exists(f"artifacts/{artifact}/{DONE}"):
        done = len(run.log(stage).all(objects=False))
        raise StorageError(
            f"run '{run.run_id}' has not finished {stage['key']}: {done} of {stage['rounds']} rounds; "
            f"fedtailor resume {run.run_id}"
        )
    commit = run.log(stage).newest(repair=False)
    if commit is None:
        raise StorageError(f"run '{run.run_id}': {stage['key']} has no rounds, so nothing was trained")
    return commit


def _base(run: RunFolder, exp: ExperimentBase, parent: str, copied: Path | None) -> tuple[Path, str]:
    """The base model's folder and fingerprint; a copy elsewhere must be the same model."""
    own = model_of(run, parent).resolve()
    folder = own if copied is None else copied.expanduser().resolve()
    check_folder(folder, exp.task.max_length, exp.task_entry.kind)
    fingerprint, expected = (hub.fingerprint(ModelSource("folder", at.name, str(at))) for at in (folder, own))
    if fingerprint != expected:
        raise ModelError(
            f"{folder} is not the base model of run '{run.run_id}': its fingerprint is {fingerprint}, that of the "
            f"run's is {expected} (in {own})"
        )
    return folder, fingerprint


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
