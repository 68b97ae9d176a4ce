"""The trained strategy generator of a run, the base model that it was trained for, and what it makes for a client.

FedP2EFT section 3.2, inference: features of the client's texts -> lambda -> the r L largest -> fine-tuning with
lambda frozen. Nothing here depends on whether the generator saw the client's language.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedtailor.core.config import merge_layers, validate
from fedtailor.core.errors import ConfigError, ModelError, StorageError
from fedtailor.core.messages import FloatArray
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import seed_for
from fedtailor.core.settings import ModelConfig
from fedtailor.evaluation.classification import evaluate
from fedtailor.experiment.config import ExperimentBase, method_section, to_json
from fedtailor.experiment.launch import load_experiment
from fedtailor.federated.context import ClientContext, Lane, Received, open_params
from fedtailor.federated.method import Method, best_of
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.methods.fedp2eft import FedP2EFTConfig
from fedtailor.models import hub
from fedtailor.models.dimensions import dimensions
from fedtailor.models.folder import check_folder
from fedtailor.models.load import load_config
from fedtailor.models.source import ModelSource
from fedtailor.storage.artifacts import fetch, model_path, published
from fedtailor.storage.digest import DONE
from fedtailor.storage.round_store import SERVER, SHARED, flatten
from fedtailor.storage.run_folder import RunFolder
from fedtailor.training.finetune import FinetuneConfig
from fedtailor.worker.open_stage import load_net

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


def personalise(
    generator: TrainedGenerator, lane: Lane, test: Examples, pad_id: int, budget: int, device: str = "cpu"
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Loads the base model and makes the adapter of a client.

    Computed in float32 whatever the run's ``engine.dtype``, so that plain peft gives the same scores.

    Args:
        generator: trained generator and base folder.
        lane: the client with the texts to learn from.
        test: texts to score on.
        pad_id: padding token.
        budget: r; r L ranks are kept.
        device: where to compute.

    Returns:
        numbers by name, as they are recorded, and the files of the peft adapter.

    Raises:
        ModelError: the base cannot be loaded, or training ran away (a loss or weight is not finite).
        StorageError: the saved generator does not fit the base.
    """
    exp = generator.exp
    model = ModelConfig(targets=exp.model.targets, base_dropout=exp.model.base_dropout)
    net = load_net(generator.base, model, generator.labels, device=device, pad_id=pad_id)
    net.unbind()
    net.train_mode(False)

    def score(logits: Callable[..., Tensor]) -> dict[str, Any]:
        [found] = evaluate(logits, [test], pad_id, exp.engine.token_budget, net.device)
        mean = {"accuracy": found.correct / found.count, "loss": found.loss_sum / found.count}
        return mean | {"correct": found.correct, "count": found.count}

    base = score(net.logits)
    method = build_method(METHOD, generator.cfg, exp.r_max)
    warned: list[str] = []
    with torch.random.fork_rng(devices=[]):
        # Only a base with dropout of its own draws from the global stream.
        torch.manual_seed(seed_for(generator.seed, "personalise", 0, lane.client.id, "base-dropout"))
        made = method.personaliser(_context(generator, method, net, lane, pad_id, budget, warned))
    assert made.ranks is not None
    assert made.export is not None
    net.train_mode(False)
    personalised = score(made.logits)
    if not np.isfinite(personalised["loss"]):
        raise ModelError(
            f"the loss after fine-tuning is {personalised['loss']}; try a smaller lr than {generator.cfg.finetune.lr:g}"
        )
    top = int(np.bincount(lane.train.labels).argmax())
    hits, count = int((test.labels == top).sum()), len(test.labels)
    majority = {"class": generator.labels[top], "accuracy": hits / count, "correct": hits, "count": count}
    return {
        "scores": {"majority": majority, "base": base, "personalised": personalised},
        "train_loss": float(made.metrics["train_loss"][0]),
        "tied_at_threshold": float(made.metrics["tied_at_threshold"][0]),
        "ranks": dict(zip(generator.modules, made.ranks[0].tolist(), strict=True)),
        "warnings": warned,
    }, made.export(0, str(generator.base))


def _context(
    generator: TrainedGenerator, method: Method, net: LaneNet, lane: Lane, pad_id: int, budget: int, warned: list[str]
) -> ClientContext:
    """One lane that has received the generator."""
    params = open_params(net, 1, None, method.modules, generator.seed)
    shared = params.of_scope(Scope.SHARED)
    row = torch.from_numpy(best_of(generator.server, flatten(shared, generator.shared)).copy()).to(net.device)
    params.flat(Scope.SHARED)[0].data.copy_(row)
    return ClientContext(
        net=net,
        lanes=(lane,),
        params=params,
        seed=generator.seed,
        stage="personalise",
        round=0,
        num_labels=len(generator.labels),
        pad_id=pad_id,
        feature_source=lambda lanes, pad_to: [client_features(net, x.train, pad_id, pad_to) for x in lanes],
        warn=lambda lane, sentence: warned.append(sentence),
        budgets=(budget,),
        r_max=generator.exp.r_max,
        received=Received(shared, row.unsqueeze(0), [0]),
        fresh=torch.tensor([True], device=net.device),
    )
