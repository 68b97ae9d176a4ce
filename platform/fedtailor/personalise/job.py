"""What ``fedtailor personalise`` is asked for, and every check that needs no weights.

The folder that a personalised newcomer takes home: peft adapter, record, how to load it, merged model.
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
from fedtailor.personalise.generator import METHOD, TrainedPsg, checked_fingerprint, open_psg
from fedtailor.personalise.new_client import Prepared, Result, missing_device, personalise, prepare, with_overrides
from fedtailor.storage.files import Storage

TEST_FRACTION = 0.2


@dataclass(frozen=True)
class Request:
    """What the user asked for.

    Args:
        run_id: run with the trained generator.
        data: file, folder or hub id to learn from (`newcomer_files.read_table`).
        budget: r.
        out: folder to make; must not be there or be empty.
        storage: where the run is.
        seed: of the run; default: its first.
        test: like ``data``, to score on; default: a share of ``data`` is held out.
        test_fraction: that share; default `TEST_FRACTION`.
        columns: names of the columns.
        language: code for the record; changes no number.
        words: ``key=value`` overrides of ``fedp2eft.finetune``.
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
    words: Sequence[str] = ()
    merge: bool = False
    limit: int | None = None
    base: Path | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Ready:
    """A request that passed every check that needs no weights.

    Args:
        request: as asked.
        psg: trained generator and base folder.
        cfg: the method's configuration, overridden.
        fingerprint: of the base model.
        train: rows to learn from.
        test: rows to score on.
        tokens: both, tokenised.
        overlap: held-out rows whose text is trained on as well (only where the user gave the held-out rows).
    """

    request: Request
    psg: TrainedPsg
    cfg: FedP2EFTConfig
    fingerprint: str
    train: Labelled
    test: Labelled
    tokens: Prepared
    overlap: int


def check(request: Request) -> Ready:
    """Opens the run, reads the data and tokenises it; loads no weights and writes nothing.

    Raises:
        TailorError: the first thing that cannot work; see `newcomer_psg`, `newcomer_files`, `newcomer_data`.
    """
    _refuse_options(request)
    storage = Storage(request.storage)
    psg = open_psg(storage, request.run_id, request.seed, request.budget, request.base)
    cfg = with_overrides(psg.cfg, request.words)
    train, test = _read(request, psg)
    fingerprint = checked_fingerprint(storage, psg)
    tokens = prepare(load_tokenizer(psg.base), train, test, psg.exp.task.max_length)
    return Ready(request, psg, cfg, fingerprint, train, test, tokens, shared_texts(train, test))


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


def _read(request: Request, psg: TrainedPsg) -> tuple[Labelled, Labelled]:
    """Rows to learn from and rows to score on."""
    data = _labelled(request.data, "train", request.columns, psg)
    if request.limit is not None:
        data = limited(data, request.limit, psg.seed)
    refuse_single_class(data, psg.labels)
    if request.test is None:
        fraction = TEST_FRACTION if request.test_fraction is None else request.test_fraction
        return hold_out(data, fraction, psg.seed)
    test = _labelled(request.test, "test", request.columns, psg)
    if (data.pairs is None) != (test.pairs is None):
        with_pairs, without = (data, test) if test.pairs is None else (test, data)
        raise DataError(
            f"{with_pairs.name} has pairs of texts ({with_pairs.columns.text}, {with_pairs.columns.pair}), "
            f"{without.name} has single texts; name both columns with --text and --pair"
        )
    return data, test


def _labelled(source: str, use: Use, columns: Columns, psg: TrainedPsg) -> Labelled:
    return labelled(read_table(source, use), columns, psg.labels)


RECORD, README, MERGED = "personalise.json", "README.md", "merged"

SCHEMA = 1


def carry_out(ready: Ready) -> Result:
    """Personalises and writes ``--out``, as a whole or not at all.

    Raises:
        TailorError: see `newcomer.personalise`.
    """
    request = ready.request
    result = personalise(ready.psg, ready.cfg, ready.tokens, request.budget, request.language, request.device)
    write_newcomer(ready, result, request.out.expanduser())
    return result


def write_newcomer(ready: Ready, result: Result, out: Path) -> None:
    """Writes the adapter's files, `RECORD`, `README` and, where it was asked for, `MERGED`."""
    with staged_folder(out) as stage:
        for name, content in result.files.items():
            (stage / name).write_bytes(content)
        text = json.dumps(record(ready, result), indent=2, ensure_ascii=False, allow_nan=False)
        (stage / RECORD).write_text(text + "\n", encoding="utf-8")
        (stage / README).write_text(readme(ready, result), encoding="utf-8")
        if ready.request.merge:
            _write_merged(ready.psg, stage)


def record(ready: Ready, result: Result) -> dict[str, Any]:
    """Everything that the numbers follow from, and the numbers; JSON without clock or host."""
    request, psg = ready.request, ready.psg
    label, hits = result.majority
    held_out = result.base.count
    return {
        "schema": SCHEMA,
        "fedtailor": __version__,
        "run": psg.run_id,
        "method": METHOD,
        "seed": psg.seed,
        "strategy": psg.artifact,
        "budget": request.budget,
        "base": {"fingerprint": ready.fingerprint, "layers": len(psg.modules), "labels": list(psg.labels)},
        "language": request.language,
        "max_length": psg.exp.task.max_length,
        "data": _part(ready.train, ready.tokens.truncated[0], psg),
        "test": {
            "how": "given" if request.test is not None else "held out of the data",
            **_part(ready.test, ready.tokens.truncated[1], psg),
            "also_in_data": ready.overlap,
        },
        "finetune": to_json(ready.cfg.finetune),
        "scores": {
            "majority": {"class": psg.labels[label], "accuracy": hits / held_out, "correct": hits, "count": held_out},
            "base": _score(result.base),
            "personalised": _score(result.personalised),
        },
        "train_loss": result.train_loss,
        "tied_at_threshold": result.tied,
        "ranks": result.ranks,
        "warnings": list(result.warnings),
    }


def loading(psg: TrainedPsg, folder: str) -> list[str]:
    """The lines of Python that load the adapter from ``folder``."""
    kinds = "(AutoModelForSequenceClassification, AutoTokenizer)"
    return [
        "from peft import PeftModel; from transformers import AutoModelForSequenceClassification, AutoTokenizer",
        f"base, tokenizer = (kind.from_pretrained({json.dumps(str(psg.base))}) for kind in {kinds})",
        f"model = PeftModel.from_pretrained(base, {json.dumps(folder)}).eval()",
    ]


def readme(ready: Ready, result: Result) -> str:
    """What it is, and how to load it."""
    psg, request = ready.psg, ready.request
    held_out = result.personalised
    return "\n".join(
        [
            f"LoRA adapter for {ready.train.name} (budget r = {request.budget}) by the strategy generator of "
            f"fedtailor run {psg.run_id}, seed {psg.seed}.",
            f"Held-out accuracy {held_out.correct}/{held_out.count}, base model {result.base.correct}/"
            f"{result.base.count}, texts cut to {psg.exp.task.max_length} tokens; all numbers are in {RECORD}. "
            "To load it, in this folder:",
            "",
            "```python",
            *loading(psg, "."),
            "```",
            "",
        ]
    )


def _part(data: Labelled, truncated: int, psg: TrainedPsg) -> dict[str, Any]:
    columns = {"text": data.columns.text, "pair": data.columns.pair, "label": data.columns.label}
    counts = dict(zip(psg.labels, data.counts(len(psg.labels)), strict=True))
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


def _write_merged(psg: TrainedPsg, adapter: Path) -> None:
    base = load_classifier(psg.base, len(psg.labels), psg.labels)
    with quiet(), warnings.catch_warnings():
        # peft asks transformers for a name that transformers is about to change; nothing for the user to do.
        warnings.simplefilter("ignore", FutureWarning)
        merged = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    save_folder(merged, load_tokenizer(psg.base), adapter / MERGED)
