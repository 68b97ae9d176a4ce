"""A whole experiment small enough for tests: three languages of real text, a few clients, a very small BERT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import ExperimentBase, overrides_of, to_json
from fedtailor.experiment.execute import Execution
from fedtailor.federated.pool import Pool
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.worker.worker import SerialPool

TINY = [
    "task.languages=[eng,amh,yor]", "task.clients_per_language=3", "task.max_length=16",
    "model.hidden_size=16", "model.layers=1", "model.intermediate_size=24", "model.vocab_size=400",
    "methods=[majority,base,lora,bayestune_lora,fedp2eft]", "budgets=[1,2]", "r_max=2",
    "base.rounds=3", "base.cohort=5", "strategy.rounds=3", "strategy.cohort=5", "personalise.chunk=5",
    "engine.backend=serial", "engine.min_segment=2", "engine.segments=3", "engine.token_budget=2048",
    "fedavg.lr=2e-3", "fedavg.batch_size=64", "fedavg.epochs=1",
    "lora.lr=5e-3", "lora.batch_size=64", "lora.epochs=1",
    "bayestune_lora.search.batch_size=64", "bayestune_lora.search.epochs=1",
    "bayestune_lora.finetune.batch_size=64", "bayestune_lora.finetune.epochs=1",
    "fedp2eft.stage1.batch_size=64", "fedp2eft.stage1.epochs=1", "fedp2eft.psg.lr=5e-3",
    "fedp2eft.finetune.batch_size=64", "fedp2eft.finetune.epochs=1",
]  # fmt: skip

TALK = [
    "task=cldr_instruct", "task.languages=[eng,swa,yor]", "task.clients_per_language=2", "task.max_length=64",
    "model.hidden_size=16", "model.layers=1", "model.intermediate_size=24", "model.vocab_size=400",
    "methods=[base,lora,fedp2eft]", "budgets=[1,2]", "r_max=2",
    "base.rounds=2", "base.cohort=4", "strategy.rounds=2", "strategy.cohort=4", "personalise.chunk=5",
    "engine.backend=serial", "engine.min_segment=2", "engine.segments=3", "engine.token_budget=2048",
    "decoding.max_new_tokens=6", "decoding.max_test=4",
    "fedavg.lr=2e-3", "fedavg.batch_size=16", "fedavg.epochs=1",
    "lora.lr=5e-3", "lora.batch_size=16", "lora.epochs=1",
    "fedp2eft.stage1.batch_size=16", "fedp2eft.stage1.epochs=1", "fedp2eft.psg.lr=5e-3",
    "fedp2eft.finetune.batch_size=16", "fedp2eft.finetune.epochs=1",
]  # fmt: skip
"""The same for instructions and responses."""

FORKED = [
    "fedtailor.cli", "fedtailor.experiment.launch", "fedtailor.experiment.prepare", "fedtailor.experiment.execute",
    "fedtailor.worker.worker", "actors.driver_actor", "pandas", "pyarrow.parquet",
    "transformers.models.bert.modeling_bert", "tiny", "real_process", "bucket_store",
]  # fmt: skip
"""What the processes that tests fork find imported, wherever the library imports it: it takes each of them seconds.
One list, since all tests of a process share the server that forks."""


def talk(storage: Path, *overrides: str) -> ExperimentBase:
    return compose([], [*TALK, f"storage={storage}", *overrides])


def tiny(storage: Path, *overrides: str) -> ExperimentBase:
    return compose([], [*TINY, f"storage={storage}", *overrides])


def open_run(exp: ExperimentBase, run_id: str = "run") -> RunFolder:
    return RunFolder.create(Storage(exp.storage), run_id, to_json(exp), overrides_of(exp))


def run_tiny(
    exp: ExperimentBase,
    run_id: str = "run",
    pool: Callable[[Any], Pool] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    events: list[dict[str, Any]] | None = None,
) -> RunFolder:
    run = open_run(exp, run_id)
    emit = (events if events is not None else []).append
    make = pool or (lambda on_event: SerialPool(exp.engine, on_event))
    Execution(exp, run, make, emit, should_stop).execute()
    return run


def run_with_fault(storage: Path, overrides: tuple[str, ...], fault: str | None) -> None:
    """For a process of its own: the tiny experiment, with one of `core.faults`' points armed."""
    import os

    import torch

    torch.set_num_threads(1)
    if fault:
        os.environ["FEDTAILOR_FAULT"] = fault
    run_tiny(tiny(storage, *overrides))
