"""What ``fedtailor personalise`` is asked for, checks that need no weights, and the folder that comes of it.

The folder holds the peft adapter, a record of every number, how to load it and, where asked for, the merged model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from fedtailor import __version__
from fedtailor.core.errors import ConfigError, DataError, StorageError
from fedtailor.core.files import staged_folder
from fedtailor.evaluation.classification import Score
from fedtailor.experiment.config import to_json
from fedtailor.methods.fedp2eft import FedP2EFTConfig
from fedtailor.models.load import load_classifier, load_tokenizer, quiet, save_folder
from fedtailor.personalise.data import Columns, Labelled, hold_out, labelled, limited, refuse_single_class, shared_texts
from fedtailor.personalise.files import Use, read_table
from fedtailor.personalise.generator import METHOD, TrainedGenerator, checked_fingerprint, open_generator
from fedtailor.personalise.new_client import Prepared, Result, missing_device, personalise, prepare, with_overrides
from fedtailor.storage.files import Storage

TEST_FRACTION = 0.2

RECORD, README, MERGED = "personalise.json", "README.md", "merged"

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
        overrides: ``key=value`` settings of ``fedp2eft.finetune``.
        merge: also write the whole model with the adapter merged.
        limit: most rows of ``data`` to use.
        base: another copy of the base model.
        device: ``cpu`` or ``cuda``.
    """

    run_id: str
    data: str
    budget: int
    out: Path
    storage: str = "./runs"
    seed: int | None = None
    test: str | None = None
    test_fraction: float | None = None
    columns: Columns = field(default_factory=Columns)
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
        generator: trained generator and base folder.
        cfg: the method's configuration, overridden.
        fingerprint: of the base model.
        train: rows to learn from.
        test: rows to score on.
        tokens: both, tokenised.
        overlap: held-out rows whose text is trained on as well (only where the user gave the held-out rows).
    """

    request: Request
    generator: TrainedGenerator
    cfg: FedP2EFTConfig
    fingerprint: str
    train: Labelled
    test: Labelled
    tokens: Prepared
    overlap: int


def check(request: Request) -> Ready:
    """Opens the run, reads the data and tokenises it; loads no weights and writes nothing.

    Raises:
        TailorError: the first thing that cannot work; see `generator`, `files` and `data`.
    """
    _refuse_options(request)
    storage = Storage(request.storage)
    generator = open_generator(storage, request.run_id, request.seed, request.budget, request.base)
    cfg = with_overrides(generator.cfg, request.overrides)
    train, test = _read(request, generator)
    fingerprint = checked_fingerprint(storage, generator)
    tokens = prepare(load_tokenizer(generator.base), train, test, generator.exp.task.max_length)
    return Ready(request, generator, cfg, fingerprint, train, test, tokens, shared_texts(train, test))


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
    if (why := missing_device(request.device)) is not None:
        problems.append(why)
    if problems:
        raise ConfigError(problems)
    out = request.out.expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is there already and not an empty folder")


def _read(request: Request, generator: TrainedGenerator) -> tuple[Labelled, Labelled]:
    """Rows to learn from and rows to score on."""
    data = _labelled(request.data, "train", request.columns, generator)
    if request.limit is not None:
        data = limited(data, request.limit, generator.seed)
    refuse_single_class(data, generator.labels)
    if request.test is None:
        fraction = TEST_FRACTION if request.test_fraction is None else request.test_fraction
        return hold_out(data, fraction, generator.seed)
    test = _labelled(request.test, "test", request.columns, generator)
    if (data.pairs is None) != (test.pairs is None):
        with_pairs, without = (data, test) if test.pairs is None else (test, data)
        raise DataError(
            f"{with_pairs.name} has pairs of texts ({with_pairs.columns.text}, {with_pairs.columns.pair}), "
            f"{without.name} has single texts; name both columns with --text and --pair"
        )
    return data, test


def _labelled(source: str, use: Use, columns: Columns, generator: TrainedGenerator) -> Labelled:
    return labelled(read_table(source, use), columns, generator.labels)


def carry_out(ready: Ready) -> Result:
    """Personalises and writes ``--out``, as a whole or not at all.

    Raises:
        TailorError: see `new_client.personalise`.
    """
    request = ready.request
    result = personalise(ready.generator, ready.cfg, ready.tokens, request.budget, request.language, request.device)
    write(ready, result, request.out.expanduser())
    return result


def write(ready: Ready, result: Result, out: Path) -> None:
    """Writes the adapter's files, `RECORD`, `README` and, where it was asked for, `MERGED`."""
    with staged_folder(out) as stage:
        for name, content in result.files.items():
            (stage / name).write_bytes(content)
        text = json.dumps(record(ready, result), indent=2, ensure_ascii=False, allow_nan=False)
        (stage / RECORD).write_text(text + "\n", encoding="utf-8")
        (stage / README).write_text(readme(ready, result), encoding="utf-8")
        if ready.request.merge:
            _write_merged(ready.generator, stage)


def record(ready: Ready, result: Result) -> dict[str, Any]:
    """Everything that the numbers follow from, and the numbers; JSON without clock or host."""
    request, generator = ready.request, ready.generator
    label, hits = result.majority
    held_out = result.base.count
    return {
        "schema": SCHEMA,
        "fedtailor": __version__,
        "run": generator.run_id,
        "method": METHOD,
        "seed": generator.seed,
        "strategy": generator.artifact,
        "budget": request.budget,
        "base": {"fingerprint": ready.fingerprint, "layers": len(generator.modules), "labels": list(generator.labels)},
        "language": request.language,
        "max_length": generator.exp.task.max_length,
        "data": _part(ready.train, ready.tokens.truncated[0], generator),
        "test": {
            "how": "given" if request.test is not None else "held out of the data",
            **_part(ready.test, ready.tokens.truncated[1], generator),
            "also_in_data": ready.overlap,
        },
        "finetune": to_json(ready.cfg.finetune),
        "scores": {
            "majority": {
                "class": generator.labels[label],
                "accuracy": hits / held_out,
                "correct": hits,
                "count": held_out,
            },
            "base": _score(result.base),
            "personalised": _score(result.personalised),
        },
        "train_loss": result.train_loss,
        "tied_at_threshold": result.tied,
        "ranks": result.ranks,
        "warnings": list(result.warnings),
    }


def loading(generator: TrainedGenerator, folder: str) -> list[str]:
    """The lines of Python that load the adapter from ``folder``."""
    kinds = "(AutoModelForSequenceClassification, AutoTokenizer)"
    return [
        "from peft import PeftModel; from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        f"base, tokenizer = (kind.from_pretrained({json.dumps(str(generator.base))}) for kind in {kinds})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder)}).eval()",
    ]


def readme(ready: Ready, result: Result) -> str:
    """What it is, and how to load it."""
    generator, request = ready.generator, ready.request
    held_out = result.personalised
    return "\n".join(
        [
            f"LoRA adapter for {ready.train.name} (budget r = {request.budget}) by the strategy generator of "
            f"fedtailor run {generator.run_id}, seed {generator.seed}.",
            f"Held-out accuracy {held_out.correct}/{held_out.count}, base model {result.base.correct}/"
            f"{result.base.count}, texts cut to {generator.exp.task.max_length} tokens; all numbers are in {RECORD}. "
            "To load it, in this folder:",
            "",
            "```python",
            *loading(generator, "."),
            "```",
            "",
        ]
    )


def _part(data: Labelled, truncated: int, generator: TrainedGenerator) -> dict[str, Any]:
    columns = {"text": data.columns.text, "pair": data.columns.pair, "label": data.columns.label}
    counts = dict(zip(generator.labels, data.counts(len(generator.labels)), strict=True))
    return {
        "name": data.name,
        "sha256": data.sha256,
        "columns": columns,
        "rows": data.rows,
        "empty": data.empty,
        "used": len(data),
        "truncated": truncated,
        "classes": counts,
    }


def _score(score: Score) -> dict[str, Any]:
    return {
        "accuracy": score.correct / score.count,
        "loss": score.loss_sum / score.count,
        "correct": score.correct,
        "count": score.count,
    }


def _write_merged(generator: TrainedGenerator, adapter: Path) -> None:
    base = load_classifier(generator.base, len(generator.labels), generator.labels)
    with quiet(), warnings.catch_warnings():
        # peft asks transformers for a name that transformers is about to change; nothing for the user to do.
        warnings.simplefilter("ignore", FutureWarning)
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    save_folder(merged, load_tokenizer(generator.base), adapter / MERGED)
