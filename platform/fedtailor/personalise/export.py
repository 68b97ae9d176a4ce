"""What a user takes out of a finished run: the base model, or one client's adapter as committed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedtailor.adapters.peft_export import CONFIG_FILE
from fedtailor.core.errors import ConfigError, StorageError, did_you_mean
from fedtailor.core.files import staged_folder
from fedtailor.core.messages import Row
from fedtailor.experiment.base_model import write_merged
from fedtailor.experiment.config import base_seed, method_section
from fedtailor.experiment.launch import load_experiment
from fedtailor.federated.method import Overlay
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.models.families import adapted_linears
from fedtailor.models.load import load_base, load_config
from fedtailor.report import refuse_used
from fedtailor.storage.artifacts import fetch, model_path, published
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.round_store import CommittedRounds, named
from fedtailor.storage.run_folder import RunFolder


def base_folder(run: RunFolder, seed: int) -> Path:
    """The run's trained base model; of a remote storage, this node's copy.

    Raises:
        StorageError: the run has none, or has not got that far.
    """
    own = run.info()["config"]["base"].get("seed")
    key = f"base/seed{seed if own is None else own}"
    stage = _stage(run, key, "the base model is the one that was configured (base=none)")
    path = model_path(str(stage["artifact"]))
    if not published(run.storage, path):
        raise StorageError(f"run '{run.run_id}' has not finished its base model; resume it first")
    return fetch(run.storage, path)


def export_base(run: RunFolder, seed: int, out: Path) -> None:
    """Copies the base model, a Hugging Face folder, to ``out``.

    Raises:
        StorageError: see `base_folder`, or ``out`` is not empty.
    """
    source = base_folder(run, seed)
    refuse_used(out)
    with staged_folder(out) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)


def export_client(run: RunFolder, client: str, method: str, budget: int, seed: int, out: Path) -> Path:
    """Writes one client's committed adapter to ``out``; returns the base model that it belongs to.

    Where the client keeps a part of the base (FedDPA-T, DEPT), that part is merged into a base of its own, which is
    written to ``out/base``.

    Args:
        run: a run that saved adapters.
        client: id, e.g. ``seen/amh/00``.
        method: row of METHODS.
        budget: r.
        seed: one of the run's.
        out: new folder.

    Raises:
        ConfigError: no such method, budget or seed in the run.
        StorageError: no such client, adapters were not saved, or ``out`` is not empty.
    """
    _refuse_unknown(run, method, budget, seed)
    stage = _personalised(run, method, budget, seed)
    log = CommitLog(run.storage, f"artifacts/{stage['artifact']}")
    prefix = f"adapters/r{budget}/{client}/"
    chunk = next((commit for commit in log.all(objects=False) if client in commit.record["cohort"]), None)
    if chunk is None:
        raise StorageError(f"run '{run.run_id}' has no committed client '{client}' (ids: seen/amh/00)")
    names = [name for name in chunk.objects if name.startswith(prefix)]
    files = {name.removeprefix(prefix): chunk.bytes(name) for name in names}
    if not files:
        raise StorageError(f"method '{method}' has no adapter for client '{client}' at budget {budget}")
    refuse_used(out)
    base, own = base_of(run, seed), _own_part(run, client, seed)
    belongs = base if own is None else out / "base"
    config = json.loads(files[CONFIG_FILE]) | {"base_model_name_or_path": os.fspath(belongs.resolve())}
    with staged_folder(out) as folder:
        for name, content in {**files, CONFIG_FILE: (json.dumps(config, indent=2) + "\n").encode()}.items():
            (folder / name).write_bytes(content)
        if own is not None:
            part, tensors, labels = own
            write_merged(base, labels, part, tensors, folder / "base")
    return belongs


def base_of(run: RunFolder, seed: int) -> Path:
    """Folder of the frozen model that the later stages of a seed build on.

    Raises:
        StorageError: see `base_folder`.
    """
    if run.info()["config"]["base"]["name"] != "none":
        return base_folder(run, seed)
    stage = next(s for s in run.stages() if s["seed"] == seed)
    return fetch(run.storage, model_path(str(stage["parent"])))


def _own_part(run: RunFolder, client: str, seed: int) -> tuple[Overlay, Mapping[str, Row], Sequence[str]] | None:
    """What a client keeps of its base: how to merge it, its tensors, the labels; None if there is nothing."""
    exp = load_experiment(run)
    if exp.base.name == "none":
        return None
    overlay = build_method(exp.base.name, method_section(exp, exp.base.name), exp.r_max).overlay
    if overlay is None:
        return None
    stage = _stage(run, f"base/seed{base_seed(exp, seed)}", "there is no base")
    rounds = CommittedRounds(CommitLog(run.storage, f"artifacts/{stage['artifact']}"), (), 1)
    at = rounds.private_at()
    if client not in at:
        return None
    named_labels = dict(load_config(base_folder(run, seed)).id2label or {})
    labels = [str(name) for _, name in sorted(named_labels.items())]
    model = load_base(base_folder(run, seed), exp.task_entry.kind, labels)
    specs = overlay.specs(LaneNet(model, adapted_linears(model)))
    return overlay, named(specs, np.asarray(rounds.private(client, at[client]), np.float32)), labels


def _personalised(run: RunFolder, method: str, budget: int, seed: int) -> Mapping[str, Any]:
    """The personalising stage of a method that served ``budget``."""
    for stage in run.stages("personalise"):
        if stage["method"] == method and stage["seed"] == seed and budget in stage.get("budgets", ()):
            return stage
    return _stage(run, f"personalise/{method}/seed{seed}", f"method '{method}' was not part of it")


def _refuse_unknown(run: RunFolder, method: str, budget: int, seed: int) -> None:
    config, problems = run.info()["config"], []
    if method not in config["methods"]:
        known = list(config["methods"])
        problems.append(f"--method {method}: not in this run{did_you_mean(method, known)} (it has: {', '.join(known)})")
    for option, value, allowed in (("budget", budget, config["budgets"]), ("seed", seed, config["seeds"])):
        if value not in allowed:
            problems.append(f"--{option} {value}: not in this run (it has: {', '.join(map(str, allowed))})")
    if problems:
        raise ConfigError(problems)
    if not config["save_adapters"]:
        raise StorageError(
            f"run '{run.run_id}' kept no adapters: save_adapters was off. Run it with save_adapters=true; "
            "all stages but the personalising ones are reused"
        )


def _stage(run: RunFolder, key: str, absent: str) -> Mapping[str, Any]:
    stages = run.stages()
    for stage in stages:
        if stage["key"] == key:
            return stage
    if not stages:
        raise StorageError(f"run '{run.run_id}' has not got that far; resume it first")
    raise StorageError(f"run '{run.run_id}' has no stage {key}: {absent}")
