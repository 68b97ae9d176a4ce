"""Task ``masakhanews``: news topic classification in 16 African languages (arXiv 2304.09972).

Text is headline and article; train and dev together are the train set; each language is shuffled by seed and
halved into the seen and the unseen pool (FedP2EFT section 4.1.1).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES, TaskConfig
from fedtailor.tasks.rows import local_folder, read_text
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Pool, Source, TaskEntry

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

COLUMNS = ("category", "headline", "text", "url")

_FILES = {"train": (("train", "train_partial"), ("dev",)), "test": (("test",),)}
"""Split -> file stems that make it; alternatives in order of preference."""


def load(cfg: TaskConfig, seed: int) -> Source:
    """Texts by pool and language from ``task.path``, else $FEDTAILOR_DATA/masakhanews, else the hub.

    A folder holds ``LANG/{train,dev,test}.tsv`` or ``.tsv.gz`` (``train_partial`` where there is no
    ``train``).

    Raises:
        DataError: unknown language, missing folder or file, damaged file (names file and line), or the hub
            cannot be reached.
    """
    unknown = [language for language in cfg.languages if language not in MASAKHANEWS_LANGUAGES]
    if unknown:
        raise DataError(f"task.languages: {unknown} not in masakhanews; allowed: {', '.join(MASAKHANEWS_LANGUAGES)}")
    folder = local_folder(cfg.path, "masakhanews")
    notes = {"dropped_empty": 0, "found_duplicates": 0, "dropped_duplicates": 0}
    splits = {
        language: {
            split: _without_empty(_local(folder, language, split) if folder else _hub(language, split), notes)
            for split in _FILES
        }
        for language in cfg.languages
    }
    _duplicates(splits, cfg.drop_duplicates, notes)
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for language, parts in splits.items():
        halves = {split: _halves(parts[split], seed, language, split) for split in _FILES}
        for i, pool in enumerate(POOLS):
            pools[pool][language] = LanguagePool(train=halves["train"][i], test=halves["test"][i])
    return Source(labels=LABELS, pools=pools, notes=notes)


def _local(folder: Path, language: str, split: str) -> Iterator[Example]:
    for stems in _FILES[split]:
        yield from read_tsv(_find(folder / language, stems))


def _find(folder: Path, stems: tuple[str, ...]) -> Path:
    names = [f"{stem}.tsv{suffix}" for stem in stems for suffix in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder}: missing file, one of {', '.join(names)}")


def read_tsv(path: Path) -> Iterator[Example]:
    """Rows of one file; fields may be quoted with ``"`` and then hold line breaks.

    Raises:
        DataError: truncated gzip, not UTF-8, wrong header or number of columns, unknown category; names
            file and line (of the decompressed text, from 1; of a row, its first line).
    """
    # The default limit of 131,072 characters guards against unbalanced quotes; strict=True reports those.
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t", quotechar='"', strict=True)
    line = 1
    try:
        header = next(rows, [])
        if tuple(header[:3]) != COLUMNS[:3]:
            raise DataError(f"{path}, line 1: header is {header}, expected {list(COLUMNS)}")
        line = rows.line_num + 1
        for row in rows:
            yield _example(row, len(header), f"{path}, line {line}")
            line = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {line}: damaged or truncated TSV: {error}") from error


def _example(row: list[str], columns: int, where: str) -> Example:
    if len(row) != columns:
        raise DataError(f"{where}: {len(row)} columns, expected {columns}; the file may be truncated")
    category, headline, text = row[:3]
    if category not in LABELS:
        raise DataError(f"{where}: unknown category {category!r}; allowed: {', '.join(LABELS)}")
    return Example(f"{headline} {text}", LABELS.index(category))


def _hub(language: str, split: str) -> Iterator[Example]:
    from datasets import load_dataset  # half a second that only this path needs

    for name in ("train", "validation") if split == "train" else ("test",):
        try:
            rows: Iterable[dict[str, Any]] = load_dataset(HUB_ID, language, split=name)
        except Exception as error:  # the library lets OSError, ValueError, HTTP and its own errors through
            raise DataError(
                f"cannot load {HUB_ID} ({language}, {name}) from the hub: {type(error).__name__}: {error}. "
                "Set task.path to a local folder, or the environment variable FEDTAILOR_DATA"
            ) from error
        for number, row in enumerate(rows):
            # Earlier revisions of the hub's copy had a class index instead of the category's name.
            category = row["category"] if "category" in row else LABELS[row["label"]]
            fields = [category or "", row["headline"] or "", row["text"] or ""]
            yield _example(fields, 3, f"{HUB_ID} ({language}, {name}), row {number}")


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


def _halves(examples: list[Example], seed: int, language: str, split: str) -> tuple[list[Example], list[Example]]:
    order = numpy_rng(seed, "masakhanews", language, split).permutation(len(examples))
    shuffled = [examples[i] for i in order]
    middle = (len(shuffled) + 1) // 2
    return shuffled[:middle], shuffled[middle:]


ENTRY = TaskEntry(load, "classification")
