"""Real weights against peft and a plain loop on the same rows: LoRA, clients at four budgets, answers."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from measure import HERE, last_line, our_path, peer_variables, python

Say = Callable[[str], None]
Keep = Callable[[dict[str, Any]], None]
WORK = (
    ("minilm", "train"), ("minilm", "budgets"),
    ("smollm2-135m", "train"), ("smollm2-135m", "budgets"), ("smollm2-135m", "answer"),
)  # fmt: skip
SIDES = (
    ("plain", "float32", "usual"), ("plain", "bfloat16", "usual"), ("peft", "float32", "usual"),
    ("peft", "bfloat16", "usual"), ("ours", "float32", "usual"), ("ours", "float32", "eager"),
    ("ours", "bfloat16", "usual"), ("ours", "bfloat16", "eager"),
)  # fmt: skip
"""Side, type of its products, attention kernel; eager is what ``model.attention=auto`` takes on some machines."""

GOALS = {"train": {"minilm": 1.5, "smollm2-135m": 1.2}, "budgets": 2.0, "answer": 3.0}
LABELS = {
    "train": "LoRA r = 8 of 8 clients, one epoch", "budgets": "2 clients at r = 2, 4, 8, 16",
    "answer": "answers of 8 clients, 32 tokens at most",
}  # fmt: skip
TYPES = ("float32", "bfloat16")
LIMIT_S = 900.0


def real_part(say: Say, keep: Keep, quick: bool = False, dtypes: Sequence[str] = TYPES) -> dict[str, Any]:
    """Every side of every work, in these types, in a process of its own, one after the other, on one thread each.

    Args:
        say: progress.
        keep: is given what there is after every row.
        quick: too few rows for a figure that means something.
        dtypes: of `TYPES`.
    """
    rows: list[dict[str, Any]] = []
    for model, work in WORK:
        for side, dtype, attention in [side for side in SIDES if side[1] in dtypes]:
            row = {"model": model, "work": work, "side": side, "dtype": dtype, "attention": attention}
            size = "quick" if quick else "whole"
            found = measured("real_side.py", model, work, side, dtype, attention, size)
            rate = {} if "missing" in found else {"per_s": found["tokens"] / min(found["seconds"])}
            rows.append(row | found | rate)
            keep({"rows": rows})
            say(
                f"real: {model}, {work}, {side}, {dtype}, {attention}: {rows[-1].get('per_s', rows[-1].get('missing'))}"
            )
    return {"rows": rows}


def measured(script: str, *words: str) -> dict[str, Any]:
    """What a script, called with ``words`` and a folder, prints as JSON in its last line; or why it did not."""
    variables = {**os.environ, **peer_variables(), **our_path()}
    with tempfile.TemporaryDirectory(prefix="bench") as folder:
        command = [python(), str(HERE / script), *words, folder]
        try:
            done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return {"missing": f"not finished after {LIMIT_S:.0f} s"}
    if done.returncode:
        return {"missing": last_line(done.stderr)}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def gain(rows: Sequence[Mapping[str, Any]], model: str, work: str) -> float | None:
    """Our best against the best of peft and the plain loop, each in its better type; None: not measured."""
    known = [row for row in rows if (row["model"], row["work"]) == (model, work) and "per_s" in row]
    ours, theirs = ([row["per_s"] for row in known if (row["side"] == "ours") is own] for own in (True, False))
    return max(ours) / max(theirs) if ours and theirs else None


def goal(model: str, work: str) -> float:
    """What `gain` should be."""
    found = GOALS[work]
    return found[model] if isinstance(found, dict) else found
