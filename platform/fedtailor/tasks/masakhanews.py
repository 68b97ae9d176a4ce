"""Task ``masakhanews``: news topic classification in 16 African languages (arXiv 2304.09972).

Text is headline and article; train and dev together are the train set; each language is shuffled by seed and
halved into the seen and the unseen pool (FedP2EFT section 4.1.1).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fedtailor.core.errors import DataError
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES, TaskConfig
from fedtailor.tasks.places import language_file, language_folders
from fedtailor.tasks.rows import Row, hub_rows, separated_rows
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Pool, Source, TaskEntry, check_languages, seeded_halves

LABELS: tuple[str, ...] = (
    "business",
    "entertainment",
    "health",
    "politics",
    "religion",
    "sports",
    "technology",
)

HUB_ID = "masakhane/masakhanews"
COLUMNS = ("category", "headline", "text")
_FILES = {"train": (("train.tsv", "train_partial.tsv"), ("dev.tsv",)), "test": (("test.tsv",),)}
"""Split -> files that make it; alternatives in order of preference."""


def load(cfg: TaskConfig, seed: int) -> Source:
    """Texts by pool and language from ``task.path``, else $FEDTAILOR_DATA/masakhanews, else the hub.

    A folder holds ``LANG/{train,dev,test}.tsv`` or ``.tsv.gz`` (``train_partial`` where there is no
    ``train``).

    Raises:
        DataError: unknown language, missing folder or file, damaged file (names file and line), or the hub
            cannot be reached.
    """
    check_languages(cfg.languages, "masakhanews", MASAKHANEWS_LANGUAGES)
    folder = language_folders(cfg.path, "masakhanews")
    notes = {"dropped_empty": 0, "found_duplicates": 0, "dropped_duplicates": 0}
    splits = {
        language: {split: _without_empty(_read(folder, language, split), notes) for split in _FILES}
        for language in cfg.languages
    }
    _duplicates(splits, cfg.drop_duplicates, notes)
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for language, parts in splits.items():
        halves = {split: seeded_halves(part, seed, "masakhanews", language, split) for split, part in parts.items()}
        for pool in POOLS:
            pools[pool][language] = LanguagePool(train=halves["train"][pool], test=halves["test"][pool])
    return Source(labels=LABELS, pools=pools, notes=notes)


def read_tsv(path: Path) -> Iterator[Example]:
    """Rows of one file; fields may be quoted with ``"`` and then hold line breaks.

    Raises:
        DataError: truncated gzip, not UTF-8, wrong header or number of columns, unknown category; names
            file and line (of the decompressed text, from 1; of a row, its first line).
    """
    return map(_example, separated_rows(path, COLUMNS))


def _read(folder: Path | None, language: str, split: str) -> Iterator[Example]:
    """One split of a language, from its files or from the hub."""
    if folder:
        for names in _FILES[split]:
            yield from read_tsv(language_file(folder, language, names))
        return
    for name in ("train", "validation") if split == "train" else ("test",):
        yield from map(_example, hub_rows(HUB_ID, language, split=name))


def _example(row: Row) -> Example:
    # Earlier revisions of the hub's copy had a class index instead of the category's name.
    category = row.values["category"] if "category" in row.values else LABELS[row.values["label"]]
    if category not in LABELS:
        raise DataError(f"{row.where}: unknown category {category!r}; allowed: {', '.join(LABELS)}")
    return Example(f"{row.values['headline'] or ''} {row.values['text'] or ''}", LABELS.index(category))


def _without_empty(examples: Iterable[Example], notes: dict[str, int]) -> list[Example]:
    kept = []
    for example in examples:
        if example.text.strip():
            kept.append(example)
        else:
            notes["dropped_empty"] += 1
    return kept


def _duplicates(splits: dict[str, dict[str, list[Example]]], drop: bool, notes: dict[str, int]) -> None:
    """Counts test texts that are train texts of any language, and drops them on request."""
    train = {e.normal for parts in splits.values() for e in parts["train"]}
    for parts in splits.values():
        kept = [e for e in parts["test"] if e.normal not in train]
        notes["found_duplicates"] += len(parts["test"]) - len(kept)
        if drop:
            parts["test"] = kept
    notes["dropped_duplicates"] = notes["found_duplicates"] if drop else 0


ENTRY = TaskEntry(load, "classification")
