"""Task ``dolly_category``: which of 8 kinds of request an instruction of databricks-dolly-15k is (CC BY-SA 3.0).

An instruction is classified with its context, where it has one. Each pool gets half of every category; its clients have
the label skew of ``task.alpha``.
"""

from __future__ import annotations

from fedtailor.core.errors import ConfigError
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.dolly import DOLLY_CATEGORIES, SAMPLE, read
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Pool, Source, TaskEntry, normalise, seeded_halves

LANGUAGE = "eng"


def load(cfg: TaskConfig, seed: int) -> Source:
    """Instructions as texts and categories as classes, by pool.

    Args:
        cfg: `path` (default: the sample of 3,003 rows that comes with the package) and `test_fraction` are used.
        seed: run seed.

    Raises:
        ConfigError: languages other than English.
        DataError: see `dolly.load`.
    """
    if cfg.languages != (LANGUAGE,):
        raise ConfigError(
            f"'task.languages' ({', '.join(cfg.languages)}): dolly_category is in English alone ({LANGUAGE})"
        )
    by_category, notes = read(cfg.path, DOLLY_CATEGORIES, lambda example: normalise(example.text))
    splits: dict[Pool, tuple[list[Example], list[Example]]] = {pool: ([], []) for pool in POOLS}
    for category, examples in by_category.items():
        for pool, half in seeded_halves(examples, seed, "dolly_category", category).items():
            texts, tests = [Example(e.text, e.label) for e in half], round(len(half) * cfg.test_fraction)
            for split, part in zip(splits[pool], (texts[tests:], texts[:tests]), strict=True):
                split.extend(part)
    pools: dict[Pool, dict[str, LanguagePool]] = {}
    for pool, (train, test) in splits.items():
        pools[pool] = {LANGUAGE: LanguagePool(tuple(train), tuple(test))}
    return Source(labels=DOLLY_CATEGORIES, pools=pools, notes=notes, disjoint=True)


ENTRY = TaskEntry(
    load,
    "classification",
    embedded=True,
    defaults={"path": SAMPLE, "languages": (LANGUAGE,), "clients_per_language": 16, "test_fraction": 0.2},
)
