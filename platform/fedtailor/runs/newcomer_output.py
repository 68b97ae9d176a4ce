"""The folder that a personalised newcomer takes home: peft adapter, record, how to load it, merged model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel

from fedtailor import __version__
from fedtailor.models.classifier import load_classifier, load_tokenizer
from fedtailor.models.folder import quiet, save_folder, staged_folder
from fedtailor.runs.experiment import to_json
from fedtailor.runs.newcomer import Result, personalise
from fedtailor.runs.newcomer_data import Labelled
from fedtailor.runs.newcomer_job import Ready
from fedtailor.runs.newcomer_psg import METHOD, TrainedPsg
from fedtailor.tasks.classification import Score

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
