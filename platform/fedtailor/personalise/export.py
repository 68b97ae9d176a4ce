"""What a user takes out of a finished run: the base model, or a client's adapter, and how an adapter is loaded."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel

from fedtailor.adapters.peft_export import CONFIG_FILE
from fedtailor.core.errors import ConfigError, StorageError, did_you_mean
from fedtailor.core.files import refuse_used, staged_folder
from fedtailor.core.messages import ALL_BUDGETS, Row
from fedtailor.core.settings import ModelConfig
from fedtailor.experiment.config import ExperimentBase, method_of
from fedtailor.experiment.launch import load_experiment
from fedtailor.experiment.stage_results import write_merged
from fedtailor.federated.method import Overlay
from fedtailor.models.load import load_base, load_tokenizer, quiet, save_folder
from fedtailor.personalise.trained import labels_of, model_of, personal_stage
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.round_store import ADAPTERS, CommittedRounds, adapter_files, named
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.source import TaskKind
from fedtailor.worker.open_stage import load_net

RECORD = "personalise.json"
"""Everything that a new client's numbers follow from, and the numbers."""


def base_folder(run: RunFolder, seed: int) -> Path:
    """The run's trained base model; of a remote storage, this node's copy.

    Raises:
        StorageError: the run has none, or has not got that far.
    """
    base = run.info()["config"]["base"]
    key = f"base/seed{seed if base.get('seed') is None else base['seed']}"
    stage = next((stage for stage in run.stages("base") if stage["key"] == key), None)
    if stage is None:
        configured = base["name"] == "none"
        why = "the base model is the one that was configured (base=none)" if configured else "resume it first"
        raise StorageError(f"run '{run.run_id}' has no stage {key}: {why}")
    return model_of(run, str(stage["artifact"]))


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
    exp = load_experiment(run)
    _refuse_unknown(run, exp, method, budget, seed)
    stage = personal_stage(run, method, seed, budget)
    commits = run.log(stage).all(objects=False)
    chunk = next((commit for commit in commits if client in commit.record["cohort"]), None)
    if chunk is None:
        known = [str(other) for commit in commits for other in commit.record["cohort"]]
        hint = did_you_mean(client, known) or f" (one of its {len(known)}: {known[0]})" * bool(known)
        raise StorageError(f"run '{run.run_id}' has no committed client '{client}'{hint}")
    # Earlier versions named the files by the client's id as it is.
    here = (adapter_files(f"r{budget}/{client}"), adapter_files(f"{ALL_BUDGETS}/{client}"))
    for prefix in (*here, f"{ADAPTERS}r{budget}/{client}/"):
        files = {name.removeprefix(prefix): chunk.bytes(name) for name in chunk.objects if name.startswith(prefix)}
        if files:
            break
    if not files:
        raise StorageError(f"method '{method}' has no adapter for client '{client}' at budget {budget}")
    refuse_used(out)
    base = model_of(run, str(stage["parent"]))
    own = _own_part(run, exp, str(stage["parent"]), client, base)
    belongs = base if own is None else out / "base"
    files = belonging(files, belongs)
    with staged_folder(out) as folder:
        for name, content in files.items():
            (folder / name).write_bytes(content)
        if own is not None:
            part, tensors, labels = own
            write_merged(base, labels, part, tensors, folder / "base")
    return belongs


def belonging(files: Mapping[str, bytes], base: Path) -> dict[str, bytes]:
    """The files of a peft adapter that names the folder of its base model."""
    config = json.loads(files[CONFIG_FILE]) | {"base_model_name_or_path": os.fspath(base.resolve())}
    return {**files, CONFIG_FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def _own_part(
    run: RunFolder, exp: ExperimentBase, artifact: str, client: str, base: Path
) -> tuple[Overlay, Mapping[str, Row], Sequence[str]] | None:
    """What a client keeps of its base: how to merge it, its tensors, the labels; None if there is nothing."""
    overlay = None if exp.base.name == "none" else method_of(exp, exp.base.name).overlay
    if overlay is None:
        return None
    rounds = CommittedRounds(CommitLog(run.storage, f"artifacts/{artifact}"), (), 1)
    at = rounds.private_at()
    if client not in at:
        return None
    labels = labels_of(base)
    specs = overlay.specs(load_net(base, ModelConfig(), labels, exp.task_entry.kind))
    return overlay, named(specs, np.asarray(rounds.private(client, at[client]), np.float32)), labels


def _refuse_unknown(run: RunFolder, exp: ExperimentBase, method: str, budget: int, seed: int) -> None:
    problems = []
    if method not in exp.methods:
        known = ", ".join(exp.methods)
        problems.append(f"--method {method}: not in this run{did_you_mean(method, exp.methods)} (it has: {known})")
    for option, value, allowed in (("budget", budget, exp.budgets), ("seed", seed, exp.seeds)):
        if value not in allowed:
            problems.append(f"--{option} {value}: not in this run (it has: {', '.join(map(str, allowed))})")
    if problems:
        raise ConfigError(problems)
    if not exp.save_adapters:
        raise StorageError(
            f"run '{run.run_id}' kept no adapters: save_adapters was off. Run it with save_adapters=true; "
            "all stages but the personalising ones are reused"
        )


def loading(base: Path, folder: str, kind: TaskKind) -> list[str]:
    """The lines of Python that load the adapter in ``folder`` onto its base model."""
    auto = "AutoModelForCausalLM" if kind == "generation" else "AutoModelForSequenceClassification"
    return [
        f"from peft import PeftModel; from transformers import {auto}, AutoTokenizer",
        f"base, tokenizer = (kind.from_pretrained({json.dumps(str(base))}) for kind in ({auto}, AutoTokenizer))",
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder)}).eval()",
    ]


def readme(record: Mapping[str, Any], base: Path) -> str:
    """What a new client's adapter is, and how to load it.

    Args:
        record: content of `RECORD`.
        base: the base model that it belongs to.
    """
    without, own = record["scores"]["base"], record["scores"]["personalised"]
    if "accuracy" in own:
        kind: TaskKind = "classification"
        told = f"accuracy {own['correct']}/{own['count']}, base model {without['correct']}/{without['count']}"
    else:
        kind = "generation"
        told = (
            f"ROUGE-L {100 * own['rougeL']:.1f} % and response loss {own['loss']:.4f} over {own['count']} "
            f"instructions, base model {100 * without['rougeL']:.1f} % and {without['loss']:.4f}"
        )
    lines = "\n".join(loading(base, ".", kind))
    return (
        f"LoRA adapter for {record['data']['name']} (budget r = {record['budget']}) by {record['method']} of fedtailor "
        f"run {record['run']}, seed {record['seed']}.\n"
        f"Held out: {told}; texts cut to {record['max_length']} tokens; all numbers are in {RECORD}. "
        f"To load it, in this folder:\n\n```python\n{lines}\n```\n"
    )


def merge_adapter(base: Path, adapter: Path, out: Path, kind: TaskKind) -> None:
    """Writes a model with its peft adapter merged, as a whole."""
    model = load_base(base, kind, labels_of(base))
    with quiet(), warnings.catch_warnings():
        # peft asks transformers for a name that transformers is about to change, and says which of GPT-2's layers keep
        # their weights transposed; nothing for the user to do.
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("ignore", message="fan_in_fan_out")
        merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    save_folder(merged, load_tokenizer(base), out)
