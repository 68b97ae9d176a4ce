"""What stages on real weights are made of: the rows of a table, each measured by `real_profile` in its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from real_work import TYPES, Keep, Say, measured


@dataclass(frozen=True)
class Work:
    """A row: what is done, by which method of which kind of stage.

    Args:
        kind: of the stage: ``rounds`` or ``personalise``.
        method: row of the METHODS table.
        config: of the method, but for rates and sizes of batches.
        budgets: of the stage.
        lanes: most lanes of a pass; None: as many as the platform takes.
        clients: None: the model's own number.
        then: what is done with what a personaliser made: the rows that it was trained on are read, or test rows are
            answered.
    """

    kind: str
    method: str
    config: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[int, ...] = (8,)
    lanes: int | None = None
    clients: int | None = None
    then: Literal["nothing", "read", "answer"] = "nothing"


def _search(lanes: int) -> Work:
    return Work("rounds", "fedp2eft", {"stage1": {"epochs": 1}}, lanes=lanes, clients=16)


WORKS: Mapping[str, Work] = {
    "base, LoRA": Work("rounds", "fedavg", {"adapter": "lora", "epochs": 1}),
    "base, full": Work("rounds", "fedavg", {"adapter": "full", "epochs": 1}),
    "FedP²EFT's round, 1 lane": _search(1),
    "FedP²EFT's round, 4 lanes": _search(4),
    "FedP²EFT's round, 16 lanes": _search(16),
    "LoRA at r = 2, 4, 8, 16": Work("personalise", "lora", {"epochs": 1}, budgets=(2, 4, 8, 16), clients=4),
    "evaluation": Work("personalise", "base", then="read"),
    "greedy decoding": Work("personalise", "base", then="answer"),
}
CHOICES = (("float32", "usual"), ("float32", "eager"), ("bfloat16", "usual"), ("bfloat16", "eager"))
"""Compute type and attention kernel."""


def profile_part(say: Say, keep: Keep, quick: bool = False, dtypes: Sequence[str] = TYPES) -> dict[str, Any]:
    """Every work of both models with every choice of these types, one after the other; see `real_part`."""
    rows: list[dict[str, Any]] = []
    for model in ("minilm", "smollm2-135m"):
        for name, work in WORKS.items():
            if work.then == "answer" and model == "minilm":
                continue
            for dtype, attention in [choice for choice in CHOICES if choice[0] in dtypes][: 1 if quick else None]:
                row = {"model": model, "work": name, "dtype": dtype, "attention": attention}
                found = measured("real_profile.py", model, name, dtype, attention)
                rows.append(row | found | ({} if "missing" in found else {"per_s": found["tokens"] / found["cpu"]}))
                keep({"rows": rows})
                say(f"profile: {', '.join(row.values())}: {rows[-1].get('per_s', found.get('missing'))}")
    return {"rows": rows}
