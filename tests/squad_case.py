"""Made-up questions in SQuAD's file format: who lives where, in short paragraphs and in ones longer than a window."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from fedtailor.core.seeding import numpy_rng

PEOPLE = ("Ada", "Berta", "Carl", "Dora", "Emil", "Frida", "Gustav", "Hanna")
TOWNS = ("Bergen", "Cairo", "Delhi", "Essen", "Faro", "Gdansk", "Havana", "Izmir")
ARTICLES = ("Alps", "Birds", "Coal", "Dunes")
SPANS = [
    "task=squad", "task.subset=v2", "task.max_length=32", "task.stride=8",
    "model.hidden_size=16", "model.layers=1", "model.intermediate_size=24", "model.vocab_size=200",
    "methods=[base,lora,fedp2eft]", "budgets=[1,2]", "r_max=2", "base.name=none",
    "strategy.rounds=2", "strategy.cohort=4", "personalise.chunk=5", "personalise.pools=[seen]",
    "engine.backend=serial", "engine.min_segment=2", "engine.segments=2", "engine.token_budget=2048",
    "lora.lr=5e-3", "lora.batch_size=16", "lora.epochs=1",
    "fedp2eft.stage1.batch_size=16", "fedp2eft.stage1.epochs=1", "fedp2eft.psg.lr=5e-3",
    "fedp2eft.finetune.batch_size=16", "fedp2eft.finetune.epochs=1",
]  # fmt: skip
"""A whole experiment small enough for tests, beside ``task.path`` and ``storage``."""


def squad_tree(each: int = 3, answerable: float = 0.7) -> dict[str, Any]:
    """Articles of paragraphs with a question to each person that they name, and to one who is not there."""
    rng = numpy_rng("squad case")
    articles = []
    for title in ARTICLES:
        paragraphs = []
        for number in range(each):
            people = rng.permutation(PEOPLE)[: int(rng.integers(3, 6))].tolist()
            places = [str(rng.choice(TOWNS)) for _ in people]
            filler = " ".join(["It rains ."] * int(rng.integers(0, 4)))
            context = " ".join(f"{who} lives in {town} . {filler}" for who, town in zip(people, places, strict=True))
            qas = []
            for who, town in zip(people, places, strict=True):
                start = context.index(town, context.index(who))
                there = rng.random() < answerable
                absent = next(name for name in PEOPLE if name not in people)
                qas.append({
                    "id": f"{title}-{number}-{who}",
                    "question": f"Where does {who if there else absent} live ?",
                    "answers": [{"text": town, "answer_start": start}] if there else [],
                    "is_impossible": not there,
                })  # fmt: skip
            paragraphs.append({"context": context, "qas": qas})
        articles.append({"title": title, "paragraphs": paragraphs})
    return {"version": "v2.0", "data": articles}


def write_squad(path: Path, tree: dict[str, Any] | None = None) -> Path:
    """The tree, or `squad_tree`'s, as a file; gzipped where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(tree or squad_tree()).encode()
    path.write_bytes(gzip.compress(text, mtime=0) if path.suffix == ".gz" else text)
    return path
