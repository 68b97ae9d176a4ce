"""A new client: one that no run knew gets the adapter that a trained strategy generator chooses for it.

What is asked for, checks that need no weights, what is learned from and what is held out, and the folder that comes of
it: the peft adapter, a record of every number, how to load it and, where asked for, the merged model.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from fedtailor import __version__
from fedtailor.core.errors import ConfigError, DataError
from fedtailor.core.files import refuse_used, staged_folder
from fedtailor.core.messages import Client
from fedtailor.core.seeding import numpy_rng
from fedtailor.experiment.config import to_json
from fedtailor.federated.context import Lane
from fedtailor.lanes.batches import Examples
from fedtailor.models.load import load_tokenizer
from fedtailor.personalise.data import Columns, Labelled, labelled, read_table
from fedtailor.personalise.export import RECORD, merge_adapter, readme
from fedtailor.personalise.generator import METHOD, TrainedGenerator, checked_fingerprint, open_generator, personalise
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.tokens import examples_of

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
        data: file, folder or hub id to learn from (`data.read_table`).
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
        TailorError: the first thing that cannot work; see `generator` and `data`.
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
    if (data.columns.pair is None) != (test.columns.pair is None):
        with_pairs, without = (data, test) if test.columns.pair is None else (test, data)
        raise DataError(
            f"{with_pairs.name} has pairs of texts ({with_pairs.columns.text}, {with_pairs.columns.pair}), "
            f"{without.name} has single texts; name both columns with --text and --pair"
        )
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
    request, generator = ready.request, ready.generator
    client = Client(CLIENT, CLIENT, request.language, len(ready.train.labels), len(ready.test.labels))
    lane = Lane(client, ready.train)
    numbers, files = personalise(generator, lane, ready.test, ready.pad_id, request.budget, request.device)
    record = {**ready.record, **numbers}
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files |= {RECORD: text.encode(), README: readme(record, ready.generator.base).encode()}
    with staged_folder(ready.request.out.expanduser()) as stage:
        for name, content in files.items():
            (stage / name).write_bytes(content)
        if ready.request.merge:
            merge_adapter(ready.generator.base, stage, stage / MERGED)
    return record


def limited(data: Labelled, limit: int, seed: int) -> Labelled:
    """At most ``limit`` rows: a seeded draw, in the order of the file."""
    if len(data) <= limit:
        return data
    return data.take(sorted(numpy_rng(seed, "newcomer", "limit").permutation(len(data))[:limit]))


def hold_out(data: Labelled, fraction: float, seed: int) -> tuple[Labelled, Labelled]:
    """Splits into train and held-out rows, each class in proportion; no class loses its last train row.

    Rows with the same text stay on one side.

    Args:
        data: all rows.
        fraction: share to hold out, between 0 and 1.
        seed: run seed.

    Raises:
        DataError: so few rows that none can be held out.
    """
    groups, labels = dict[str, list[int]](), data.labels
    for i, row in enumerate(data.examples):
        groups.setdefault(row.normal, []).append(i)
    draws = numpy_rng(seed, "newcomer", "held-out").random(len(groups))
    drawn = sorted(zip(groups.values(), draws, strict=True), key=lambda group: (labels[group[0][0]], group[1]))
    left, owed, out = Counter(labels), 0.0, set[int]()
    for rows, _ in drawn:
        owed += fraction * len(rows)
        used = Counter(labels[i] for i in rows)
        if owed >= len(rows) / 2 and all(left[label] > count for label, count in used.items()):
            out.update(rows)
            owed -= len(rows)
            left -= used
    if not out:
        raise DataError(
            f"{data.name}: {len(data)} usable rows are too few to hold out {fraction:g} of them; give more rows, a "
            "larger --test-fraction, or a file of held-out rows with --test"
        )
    return data.take(i for i in range(len(data)) if i not in out), data.take(sorted(out))


def refuse_single_class(data: Labelled, allowed: Sequence[str]) -> None:
    """Nothing can be learned from one class.

    Raises:
        DataError: fewer than two classes; names the one there is.
    """
    present = sorted(set(data.labels))
    if len(present) < 2:
        raise DataError(
            f"{data.name}: all {len(data)} usable rows are of one class ({allowed[present[0]]}); "
            "personalising needs at least two classes"
        )


def shared_texts(train: Labelled, test: Labelled) -> int:
    """Held-out rows whose text is trained on too: their score flatters."""
    trained = {row.normal for row in train.examples}
    return sum(row.normal in trained for row in test.examples)
