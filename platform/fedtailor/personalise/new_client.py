"""A new client, one that no run knew: it gets from a run's method what an unseen client of the run got.

What is asked for, checks that need no weights, a pool of this one client that is personalised as a worker does it, and
the folder that comes of it: the peft adapter, a record of every number, how to load it and, where asked for, the merged
model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from transformers import PreTrainedTokenizerBase

from fedtailor import __version__
from fedtailor.adapters.peft_export import WEIGHTS_FILE
from fedtailor.core.errors import ConfigError, ModelError
from fedtailor.core.files import refuse_used, staged_folder
from fedtailor.core.messages import ALL_BUDGETS, SegmentJob, SegmentResult
from fedtailor.experiment.config import to_json
from fedtailor.lanes.net import LaneNet
from fedtailor.models.load import load_tokenizer
from fedtailor.personalise.data import Rows, read_data, shared_texts
from fedtailor.personalise.export import RECORD, belonging, merge_adapter, readme
from fedtailor.personalise.trained import TrainedMethod, common_lora, open_method
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.columns import ONE_GROUP
from fedtailor.tasks.config import AUTO
from fedtailor.tasks.encoding import encode_texts
from fedtailor.tasks.instructions import place_of
from fedtailor.tasks.source import POOLS, SPLITS, NaturalClient, Source, Split
from fedtailor.tasks.task import prepare
from fedtailor.tasks.tokens import TokenData, tokenise
from fedtailor.worker.open_stage import OpenStage
from fedtailor.worker.segment import BASE_REF, Segment

CLIENT = "unseen/new/newcomer"
"""Client id where none is given, a coordinate of its random streams."""

README, MERGED = "README.md", "merged"
SCHEMA = 1
MEASURES = ("accuracy", "rouge1", "rouge2", "rougeL", "meteor", "exact_match", "loss")
"""Metrics of a model on the held-out rows; what else a method measures stands beside the scores."""


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        run_id: run with the trained method.
        data: file, folder or hub id to learn from.
        out: folder to make; must not be there or be empty.
        storage: where the run is.
        method: one of the run's; default: see `open_method`, as for the two below.
        budget: r.
        seed: of the run.
        test: like ``data``, to score on; default: what ``data`` says is for test, else a share of it.
        test_fraction: that share; default 0.2.
        text: name of the column; default, here and of the next two: the one that the run was told, else a usual one.
        pair, label: as ``text``.
        split_column: of ``data`` and ``test``, says ``train`` or ``test`` of each row; see `read_tables`.
        client: its id, ``unseen/LANGUAGE/NAME``.
        language: code for the record; changes no number.
        overrides: ``key=value`` settings of the fine-tuning.
        merge: also write the whole model with the adapter merged.
        limit: most rows of ``data`` to use.
        base: another copy of the base model.
        device: ``cpu`` or ``cuda``.
    """

    run_id: str
    data: str
    out: Path
    storage: str = "./runs"
    method: str | None = None
    budget: int | None = None
    seed: int | None = None
    test: str | None = None
    test_fraction: float | None = None
    text: str | None = None
    pair: str | None = None
    label: str | None = None
    split_column: str | None = AUTO
    client: str = CLIENT
    language: str = ""
    overrides: Sequence[str] = ()
    merge: bool = False
    limit: int | None = None
    base: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Ready:
    """A request that passed every check that needs no weights.

    Args:
        request: as asked.
        trained: the run's method and base.
        tokens: the one client, tokenised as the run's own clients are.
        record: content of `RECORD` as far as it is known before training.
    """

    request: Request
    trained: TrainedMethod
    tokens: TokenData
    record: Mapping[str, Any]


@dataclass(frozen=True)
class Answer:
    """A held-out instruction with its response, and what the two models answer."""

    prompt: str
    reference: str
    base: str
    personalised: str


@contextmanager
def prepared(request: Request) -> Iterator[Ready]:
    """Opens the run, reads the data and tokenises it, in a folder that goes with the block; loads no weights.

    Raises:
        TailorError: the first thing that cannot work; see `open_method`, `read_data` and `tokenise`.
    """
    _refuse_options(request)
    run = RunFolder.open(Storage(request.storage), request.run_id)
    trained = open_method(run, request.method, request.budget, request.seed, request.base, request.overrides)
    task, seed = trained.exp.task, trained.stage.seed
    named = {f"{what}_column": name for what in ("text", "pair", "label") if (name := getattr(request, what))}
    if named and trained.answers:
        raise ConfigError("--text, --pair and --label are for runs that classify; instructions have their usual names")
    own = {"split_column": request.split_column, "client_column": None, "group_column": None}
    train, test, how = read_data(
        request.data, request.test, task.model_copy(update={**own, **named}), trained.labels, request.test_fraction,
        request.limit, seed,
    )  # fmt: skip
    tokenizer = load_tokenizer(trained.base)
    place = partial(place_of, task.model_copy(update={"path": request.data}))
    with TemporaryDirectory(prefix="fedtailor-") as folder:
        texts = prepare(task, seed, Path(folder, "data"), _pool(request.client, trained, train, test))
        out = Path(folder, "tokens")
        tokens = tokenise(texts, tokenizer, task.max_length, out, task.template, task.overlong, place)
        data, held_out = (
            part.described(trained.labels) | _cut(part, split, tokens, tokenizer)
            for part, split in zip((train, test), SPLITS, strict=True)
        )
        record = {
            "schema": SCHEMA,
            "fedtailor": __version__,
            "run": run.run_id,
            "method": trained.stage.method,
            "seed": seed,
            "strategy": trained.stage.strategy,
            "budget": trained.budget,
            "base": {"fingerprint": trained.fingerprint, "labels": list(trained.labels)},
            "client": request.client,
            "language": request.language,
            "max_length": task.max_length,
            "data": data,
            "test": {"how": how} | held_out | {"also_in_data": shared_texts(train, test)},
            "finetune": to_json(trained.finetune),
        }
        yield Ready(request, trained, tokens, record)


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
    pool, *rest = request.client.split("/")
    if pool not in POOLS or len(rest) != 2 or not all(rest):
        problems.append(f"--client {request.client}: an id has three parts, e.g. {CLIENT} or seen/amh/00")
    if request.device not in ("cpu", "cuda"):
        problems.append(f"--device {request.device}: allowed are cpu and cuda")
    elif request.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: torch sees no GPU here")
    if problems:
        raise ConfigError(problems)
    refuse_used(request.out.expanduser())


def _pool(client: str, trained: TrainedMethod, train: Rows, test: Rows) -> Source:
    """The one client as all there is."""
    pool, language, name = client.split("/")
    assert pool in POOLS
    own = NaturalClient(name, pool, language, train.examples, test.examples)
    return Source(trained.labels or (ONE_GROUP,), kind=trained.exp.task_entry.kind, natural_clients=(own,))


def _cut(part: Rows, split: Split, tokens: TokenData, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Examples that did not fit."""
    if tokens.kind == "generation":
        return dict(tokens.manifest["overlong"][split])
    longest = int(tokens.manifest["max_length"])
    texts, pairs = ([getattr(e, name) for e in part.examples] for name in ("text", "pair"))
    ids, _ = encode_texts(tokenizer, texts, None if pairs[0] is None else pairs, longest + 1)
    return {"truncated": sum(len(row) > longest for row in ids)}


def carry_out(ready: Ready) -> tuple[dict[str, Any], list[Answer]]:
    """Personalises and writes ``--out``, as a whole or not at all: adapter, `RECORD`, `README`, on request `MERGED`.

    Returns:
        the record: everything that the numbers follow from, and the numbers, without clock or host; of models that
        answer, what they answered to the held-out instructions.

    Raises:
        ModelError: the base cannot be loaded, or training ran away (a loss or weight is not finite).
        StorageError: what the rounds trained does not fit the base.
    """
    trained, client = ready.trained, ready.request.client
    stage, before = _played(ready, "base")
    stage, after = _played(ready, trained.stage.method, stage.net)
    made = (after.adapters.get(f"{at}/{client}") for at in (f"r{trained.budget}", ALL_BUDGETS))
    files = next(filter(None, made), {})
    if not files and (common := common_lora(stage.method)) is not None:
        files = common.export(stage.net, stage.params[1], [client], 0, BASE_REF)
    if not files:
        raise ModelError(f"method {trained.stage.method} made no adapter: its Personalised.export is None")
    tensors, modules = load(files[WEIGHTS_FILE]), stage.net.modules
    ranks = {name: len(tensors.get(f"base_model.model.{name}.lora_A.weight", ())) for name in modules}
    scores = {"base": _scores(before), "personalised": _scores(after)}
    if not trained.answers:
        scores = {"majority": _majority(ready)} | scores
    record = {
        **ready.record,
        "base": {**ready.record["base"], "layers": len(modules)},
        "scores": scores,
        **{name: value for name, value in _numbers(after).items() if name not in MEASURES},
        "ranks": ranks,
        "warnings": [str(warning["reason"]) for warning in after.warnings],
    }
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    files = belonging(files, trained.base) | {RECORD: text.encode(), README: readme(record, trained.base).encode()}
    with staged_folder(ready.request.out.expanduser()) as out:
        for name, content in files.items():
            (out / name).write_bytes(content)
        if ready.request.merge:
            merge_adapter(trained.base, out, out / MERGED, trained.exp.task_entry.kind)
    pairs = zip(before.predictions, after.predictions, strict=True)
    return record, [Answer(x["prompt"], x["reference"], x["prediction"], y["prediction"]) for x, y in pairs]


def _played(ready: Ready, method: str, net: LaneNet | None = None) -> tuple[OpenStage, SegmentResult]:
    """A method's personalising stage with this one client, played as a worker plays it.

    Args:
        ready: the request.
        method: the one that is asked for, with what its rounds trained, or one without rounds.
        net: the model, where it is loaded.
    """
    trained = ready.trained
    spec = trained.spec(method, ready.tokens.path, ready.request.device)
    stage = OpenStage.open(spec, net)
    shared = trained.shared(stage.info()) if method == trained.stage.method else None
    result = Segment(stage, SegmentJob(spec.key, 0, 0, (ready.request.client,)), shared).play()
    for failure in result.failures:
        lr = getattr(trained.finetune, "lr", None)
        hint = "" if lr is None else f"; where training ran away, try a smaller lr than {lr:g}"
        raise ModelError(f"{failure.reason}{hint}")
    return stage, result


def _numbers(result: SegmentResult) -> dict[str, float]:
    return {row["metric"]: row["value"] for row in result.metrics if not row["module"]}


def _scores(result: SegmentResult) -> dict[str, Any]:
    """Measures on the held-out rows."""
    [count] = {int(row["weight"]) for row in result.metrics if row["metric"] == "loss"}
    found: dict[str, Any] = {name: value for name, value in _numbers(result).items() if name in MEASURES}
    hits = {"correct": round(found["accuracy"] * count)} if "accuracy" in found else {}
    return found | hits | {"count": count}


def _majority(ready: Ready) -> dict[str, Any]:
    """The class that the client has most often, as an answer to every held-out row."""
    train, test = (ready.tokens.examples(ready.request.client, split).labels for split in SPLITS)
    top = int(np.bincount(train).argmax())
    hits = int((test == top).sum())
    return {"class": ready.trained.labels[top], "accuracy": hits / len(test), "correct": hits, "count": len(test)}
