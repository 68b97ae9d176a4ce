"""A new client: one that no run knew gets the adapter that a trained strategy generator chooses for it.

FedP2EFT section 3.2, inference: features of the client's texts -> lambda -> the r L largest -> fine-tuning with
lambda frozen. Nothing here depends on whether the generator saw the client's language.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedtailor import __version__
from fedtailor.core.errors import ConfigError, ModelError
from fedtailor.core.files import refuse_used, staged_folder
from fedtailor.core.messages import Client
from fedtailor.core.scope import Scope
from fedtailor.core.seeding import seed_for
from fedtailor.evaluation.classification import evaluate
from fedtailor.experiment.config import to_json
from fedtailor.federated.context import ClientContext, Lane, open_params
from fedtailor.federated.early_stop import best_of
from fedtailor.federated.method import Method
from fedtailor.federated.received import Received
from fedtailor.lanes.batches import Examples
from fedtailor.lanes.features import client_features
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.models.load import load_tokenizer
from fedtailor.personalise.data import (
    Columns,
    Labelled,
    hold_out,
    labelled,
    limited,
    refuse_mixture,
    refuse_single_class,
    shared_texts,
)
from fedtailor.personalise.export import RECORD, merge_adapter, readme
from fedtailor.personalise.files import read_table
from fedtailor.personalise.generator import METHOD, TrainedGenerator, checked_fingerprint, open_generator
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import flatten
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.tokens import examples_of
from fedtailor.worker.open_stage import load_net

CLIENT = "newcomer"
"""Client id of every new client, a coordinate of its random streams."""

TEST_FRACTION = 0.2

README, MERGED = "README.md", "merged"

SCHEMA = 1


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        run_id: run with the trained generator.
        data: file, folder or hub id to learn from (`files.read_table`).
        budget: r.
        out: folder to make; must not be there or be empty.
        storage: where the run is.
        seed: of the run; default: its first.
        test: like ``data``, to score on; default: a share of ``data`` is held out.
        test_fraction: that share; default `TEST_FRACTION`.
        columns: names of the columns.
        language: code for the record; changes no number.
        overrides: ``key=value`` settings of ``fedp2eft.finetune``, with or without that prefix.
        merge: also write the whole model with the adapter merged.
        limit: most rows of ``data`` to use.
        base: another copy of the base model.
        device: ``cpu`` or ``cuda``.
    """

    run_id: str
    data: str
    budget: int
    out: Path
    storage: str
    seed: int | None
    test: str | None
    test_fraction: float | None
    columns: Columns
    language: str
    overrides: Sequence[str]
    merge: bool
    limit: int | None
    base: Path | None
    device: str


@dataclass(frozen=True)
class Ready:
    """A request that passed every check that needs no weights.

    Args:
        request: as asked.
        generator: trained generator and base folder.
        pad_id: padding token.
        train: texts to learn from, tokenised by the rules of the run's own clients.
        test: texts to score on.
        record: content of `RECORD` as far as it is known before training.
    """

    request: Request
    generator: TrainedGenerator
    pad_id: int
    train: Examples
    test: Examples
    record: Mapping[str, Any]


def check(request: Request) -> Ready:
    """Opens the run, reads the data and tokenises it; loads no weights and writes nothing.

    Raises:
        TailorError: the first thing that cannot work; see `generator`, `files` and `data`.
    """
    _refuse_options(request)
    run = RunFolder.open(Storage(request.storage), request.run_id)
    generator = open_generator(run, request.seed, request.budget, request.base, request.overrides)
    data, held_out = _read(request, generator)
    fingerprint = checked_fingerprint(generator)
    tokenizer = load_tokenizer(generator.base)
    assert isinstance(tokenizer.pad_token_id, int)
    (train, of_data), (test, of_test) = (_tokenised(part, tokenizer, generator) for part in (data, held_out))
    how = {"how": "held out of the data" if request.test is None else "given"}
    record = {
        "schema": SCHEMA,
        "fedtailor": __version__,
        "run": run.run_id,
        "method": METHOD,
        "seed": generator.seed,
        "strategy": generator.stage["artifact"],
        "budget": request.budget,
        "base": {"fingerprint": fingerprint, "layers": len(generator.modules), "labels": list(generator.labels)},
        "language": request.language,
        "max_length": generator.exp.task.max_length,
        "data": of_data,
        "test": how | of_test | {"also_in_data": shared_texts(data, held_out)},
        "finetune": to_json(generator.cfg.finetune),
    }
    return Ready(request, generator, tokenizer.pad_token_id, train, test, record)


def _refuse_options(request: Request) -> None:
    problems = []
    if request.test is not None and request.test_fraction is not None:
        problems.append("--test and --test-fraction exclude each other: give one")
    if request.test_fraction is not None and not 0 < request.test_fraction < 1:
        problems.append(f"--test-fraction {request.test_fraction:g}: must be between 0 and 1")
    if request.limit is not None and request.limit < 2:
        problems.append(f"--limit {request.limit}: must be 2 or more")
    if request.seed is not None and request.seed < 0:
        problems.append(f"--seed {request.seed}: must be 0 or more")
    if request.device not in ("cpu", "cuda"):
        problems.append(f"--device {request.device}: allowed are cpu and cuda")
    elif request.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: torch sees no GPU here")
    if problems:
        raise ConfigError(problems)
    refuse_used(request.out.expanduser())


def _read(request: Request, generator: TrainedGenerator) -> tuple[Labelled, Labelled]:
    """Rows to learn from and rows to score on."""
    data = labelled(read_table(request.data, "train"), request.columns, generator.labels)
    if request.limit is not None:
        data = limited(data, request.limit, generator.seed)
    refuse_single_class(data, generator.labels)
    if request.test is None:
        fraction = TEST_FRACTION if request.test_fraction is None else request.test_fraction
        return hold_out(data, fraction, generator.seed)
    test = labelled(read_table(request.test, "test"), request.columns, generator.labels)
    refuse_mixture(data, test)
    return data, test


def _tokenised(
    data: Labelled, tokenizer: PreTrainedTokenizerBase, generator: TrainedGenerator
) -> tuple[Examples, dict[str, Any]]:
    """The rows' tokens, and what `RECORD` says of the rows."""
    max_length = generator.exp.task.max_length
    texts = [row.text for row in data.examples]
    pairs = None if data.columns.pair is None else [row.pair or "" for row in data.examples]
    tokens, longer = (
        examples_of(tokenizer, texts, pairs, np.array(data.labels, dtype=np.int64), length)
        for length in (max_length, max_length + 1)
    )
    truncated = int((longer.lengths > max_length).sum())
    return tokens, data.described(generator.labels, truncated)


def carry_out(ready: Ready) -> dict[str, Any]:
    """Personalises and writes ``--out``, as a whole or not at all: adapter, `RECORD`, `README`, on request `MERGED`.

    Returns:
        the record: everything that the numbers follow from, and the numbers; without clock or host.

    Raises:
        ModelError: the base cannot be loaded, or training ran away (a loss or weight is not finite).
        StorageError: the saved generator does not fit the base.
    """
    numbers, files = _personalised(ready)
    record = {**ready.record, **numbers}
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files |= {RECORD: text.encode(), README: readme(record, ready.generator.base).encode()}
    with staged_folder(ready.request.out.expanduser()) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)
        if ready.request.merge:
            merge_adapter(ready.generator.base, stage, stage / MERGED)
    return record


def _personalised(ready: Ready) -> tuple[dict[str, Any], dict[str, bytes]]:
    """What training adds to the record, and the files of the peft adapter.

    Computed in float32 whatever the run's ``engine.dtype``, so that plain peft gives the same scores.
    """
    generator, train, test = ready.generator, ready.train, ready.test
    exp, model, seed = generator.exp, generator.exp.model, generator.seed
    net = load_net(
        generator.base, model.targets, generator.labels, device=ready.request.device, base_dropout=model.base_dropout
    )
    net.unbind()
    net.train_mode(False)

    def score(logits: Callable[..., Tensor]) -> dict[str, Any]:
        [found] = evaluate(logits, [test], ready.pad_id, exp.engine.token_budget, net.device)
        mean = {"accuracy": found.correct / found.count, "loss": found.loss_sum / found.count}
        return mean | {"correct": found.correct, "count": found.count}

    base = score(net.logits)
    method = build_method(METHOD, generator.cfg, exp.r_max)
    warned: list[str] = []
    with torch.random.fork_rng(devices=[]):
        # Only a base with dropout of its own draws from the global stream.
        torch.manual_seed(seed_for(seed, "personalise", 0, CLIENT, "base-dropout"))
        made = method.personaliser(_context(ready, method, net, warned))
    assert made.ranks is not None
    assert made.export is not None
    net.train_mode(False)
    personalised = score(made.logits)
    if not np.isfinite(personalised["loss"]):
        raise ModelError(
            f"the loss after fine-tuning is {personalised['loss']}; try a smaller lr than {generator.cfg.finetune.lr:g}"
        )
    top = int(np.bincount(train.labels).argmax())
    hits, count = int((test.labels == top).sum()), len(test.labels)
    majority = {"class": generator.labels[top], "accuracy": hits / count, "correct": hits, "count": count}
    return {
        "scores": {"majority": majority, "base": base, "personalised": personalised},
        "train_loss": float(made.metrics["train_loss"][0]),
        "tied_at_threshold": float(made.metrics["tied_at_threshold"][0]),
        "ranks": dict(zip(generator.modules, made.ranks[0].tolist(), strict=True)),
        "warnings": warned,
    }, made.export(0, str(generator.base))


def _context(ready: Ready, method: Method, net: LaneNet, warned: list[str]) -> ClientContext:
    """One lane that has received the generator."""
    generator = ready.generator
    client = Client(CLIENT, CLIENT, ready.request.language, len(ready.train.labels), len(ready.test.labels))
    params = open_params(net, 1, None, method.modules, generator.seed)
    shared = params.of_scope(Scope.SHARED)
    row = torch.from_numpy(best_of(generator.server, flatten(shared, generator.shared)).copy()).to(net.device)
    params.flat(Scope.SHARED)[0].data.copy_(row)
    return ClientContext(
        net=net,
        lanes=(Lane(client, ready.train),),
        params=params,
        seed=generator.seed,
        stage="personalise",
        round=0,
        num_labels=len(generator.labels),
        pad_id=ready.pad_id,
        feature_source=lambda lanes, pad_to: [client_features(net, x.train, ready.pad_id, pad_to) for x in lanes],
        warn=lambda lane, sentence: warned.append(sentence),
        budgets=(ready.request.budget,),
        r_max=generator.exp.r_max,
        received=Received(shared, row.unsqueeze(0), [0]),
        fresh=torch.tensor([True], device=net.device),
    )
