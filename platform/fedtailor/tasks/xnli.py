"""Task ``xnli``: natural language inference in 15 languages (arXiv 1809.05053); a text is premise and hypothesis.

Rows are parallel across languages, and the same row numbers are used in all of them; per language 2000 train and
500 test pairs to the seen and to the unseen pool, shuffled by seed (FedP2EFT section 4.1.1). Train and test texts come
from different files, whatever the seed: train and test where the source has a train file, as the paper does; else test
(5010 rows) and dev (2490 rows).

Deviation from the reference code, which shuffles single rows: a premise stands in several rows (one per class), and two
premises of one language may by chance of translation be one text in another. Rows that are linked in this way in any
language form a group, and a group goes to one pool and one split: no premise is ever in two of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.places import first_file, language_file, language_folders
from fedtailor.tasks.rows import hub_name, load_hub, read_text
from fedtailor.tasks.source import (
    POOLS,
    SPLITS,
    Example,
    LanguagePool,
    Pool,
    Source,
    Split,
    TaskEntry,
    check_languages,
    normalise,
)

Ints = npt.NDArray[np.int64]
Premises = tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]
"""Of one split's rows over all languages: keys (languages, n), equal where premises are the same normalised text, and
usable (n,), False where some language lacks a text."""

XNLI_LANGUAGES: tuple[str, ...] = (
    "ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh",
)  # fmt: skip
"""ISO 639-1 codes, the data set's 15 languages in its order."""

LABELS: tuple[str, ...] = ("entailment", "neutral", "contradiction")
HUB_ID = "facebook/xnli"
PAIRS = pa.schema({"premise": pa.large_string(), "hypothesis": pa.large_string(), "label": pa.int64()})
_WITH_TRAIN: Mapping[Split, str] = {"train": "train", "test": "test"}
_WITHOUT_TRAIN: Mapping[Split, str] = {"train": "test", "test": "dev"}


class _Table(NamedTuple):
    """Rows of one file in `PAIRS`' columns, the file's name, and what its rows are called in messages."""

    pairs: pa.Table
    name: str
    unit: str = "line"

    def where(self, row: int) -> str:
        # Lines are counted from 1, as editors do; the hub's viewer counts rows from 0.
        return f"{self.name}, {self.unit} {row + (self.unit == 'line')}"


def load(cfg: TaskConfig, seed: int) -> Source:
    """Pairs by pool and language from ``task.path``, else $FEDTAILOR_DATA/xnli, else the hub.

    A folder holds ``LANG/{dev,test}.tsv`` or ``.tsv.gz`` and, for all languages or none, ``train``: no header, no
    quoting; premise, hypothesis, label. A row that lacks a text in one language is left out of all and counted.

    Args:
        cfg: `languages`, `path`, `train_per_pool` and `test_per_pool` are used.
        seed: run seed.

    Raises:
        DataError: unknown language, missing folder or file, damaged file (names file and line), rows that are
            not parallel, or the hub cannot be reached.
    """
    check_languages(cfg.languages, "xnli", XNLI_LANGUAGES)
    folder = language_folders(cfg.path, "xnli")
    stems = _stems(folder, cfg.languages)
    premises = {split: _premises(folder, stems[split], cfg.languages) for split in SPLITS}
    places = _places(premises, {"train": cfg.train_per_pool, "test": cfg.test_per_pool}, seed)
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for language in cfg.languages:
        parts = {split: _read(folder, language, stems[split]).pairs for split in SPLITS}
        for pool in POOLS:
            train, test = (_examples(parts[split], places[pool, split]) for split in SPLITS)
            pools[pool][language] = LanguagePool(train, test)
    notes: dict[str, int | str] = {
        "train_texts_from": stems["train"],
        "test_texts_from": stems["test"],
        "dropped_empty": sum(int((~usable).sum()) for _, usable in premises.values()),
    }
    return Source(labels=LABELS, pools=pools, notes=notes, disjoint=True)


# ---- files ---------------------------------------------------------------------------------------------------------


def _stems(folder: Path | None, languages: Sequence[str]) -> Mapping[Split, str]:
    """Split -> file that it comes from, one rule for all languages."""
    if folder is None:
        return _WITH_TRAIN
    have = [language for language in languages if first_file(folder / language, ("train.tsv",))]
    lack = [language for language in languages if language not in have]
    if have and lack:
        raise DataError(
            f"{folder}: {', '.join(have)} with a train file, {', '.join(lack)} without; "
            "it is needed for all languages of the task or for none"
        )
    return _WITH_TRAIN if have else _WITHOUT_TRAIN


def _read(folder: Path | None, language: str, stem: str) -> _Table:
    """One language's rows of one file, or of one split of the hub's data set."""
    if folder:
        path = language_file(folder, language, (f"{stem}.tsv",))
        return _Table(read_tsv(path), str(path))
    found = load_hub(HUB_ID, language, split=stem).with_format("arrow")[:].select(PAIRS.names).cast(PAIRS)
    table = _Table(found, hub_name(HUB_ID, language, split=stem), "row")
    labels = table.pairs["label"].to_numpy()
    unknown = np.flatnonzero((labels < 0) | (labels >= len(LABELS)))
    if len(unknown):
        row = int(unknown[0])
        raise DataError(f"{table.where(row)}: unknown label {labels[row]}; allowed: 0 to 2, {', '.join(LABELS)}")
    return table


def read_tsv(path: Path) -> pa.Table:
    """Rows of one file as `PAIRS`; texts may be empty.

    Raises:
        DataError: truncated gzip, not UTF-8, wrong number of columns, unknown label; names file and line.
    """
    lines = read_text(path).split("\n")
    if lines[-1] == "":
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        fields = line.removesuffix("\r").split("\t")
        if len(fields) != 3:
            raise DataError(f"{path}, line {number}: {len(fields)} columns, expected 3; the file may be truncated")
        if fields[2] not in LABELS:
            raise DataError(f"{path}, line {number}: unknown label {fields[2]!r}; allowed: {', '.join(LABELS)}")
        rows.append((fields[0], fields[1], LABELS.index(fields[2])))
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table([list(column) for column in columns], schema=PAIRS)


def _premises(folder: Path | None, stem: str, languages: Sequence[str]) -> Premises:
    """Checks that rows are parallel; one language's texts are in memory at a time."""
    keys, usable = [], []
    first: _Table | None = None
    for language in languages:
        table = _read(folder, language, stem)
        first = first or table._replace(pairs=table.pairs.select(["label"]))
        _check_parallel(first, table)
        texts = [[text or "" for text in table.pairs[column].to_pylist()] for column in PAIRS.names[:2]]
        hashes = {text: hashlib.blake2b(normalise(text).encode(), digest_size=8).digest() for text in set(texts[0])}
        keys.append(np.array([int.from_bytes(hashes[text], "little") for text in texts[0]], dtype=np.uint64))
        usable.append(np.array([bool(a.strip() and b.strip()) for a, b in zip(*texts, strict=True)], dtype=np.bool_))
    return np.stack(keys), np.logical_and.reduce(usable)


def _check_parallel(first: _Table, table: _Table) -> None:
    labels, found = first.pairs["label"].to_numpy(), table.pairs["label"].to_numpy()
    if len(found) != len(labels):
        raise DataError(
            f"{table.name}: {len(found)} rows, but {first.name} has {len(labels)}; rows must be parallel across "
            "languages"
        )
    differ = np.flatnonzero(found != labels)
    if len(differ):
        row = int(differ[0])
        here, there = LABELS[found[row]], LABELS[labels[row]]
        raise DataError(
            f"{table.where(row)}: label {here}, but {first.name} has {there} there; rows must be parallel across "
            "languages"
        )


# ---- who gets which rows -------------------------------------------------------------------------------------------


def _places(
    premises: Mapping[Split, Premises], wanted: Mapping[Split, int], seed: int
) -> dict[tuple[Pool, Split], Ints]:
    """Row numbers of each pool and split, (n,) int64 in seeded order.

    Places are filled one after another, train before test and seen before unseen, with whole groups in a seeded
    order; what is left of the last group when the place is full is not used, nor is a row that lacks a text.

    Args:
        premises: all rows.
        wanted: rows of each pool; half of the usable rows where there are fewer than twice as many. There are fewer
            where test premises are used up by train rows.
        seed: run seed.
    """
    taken = np.empty(0, dtype=np.int64)
    result: dict[tuple[Pool, Split], Ints] = {}
    for split, group in zip(SPLITS, _groups([premises[split][0] for split in SPLITS]), strict=True):
        usable = premises[split][1]
        # A draw per row number, not a permutation of the groups: a language that links two groups more moves only
        # these.
        draws = numpy_rng(seed, "parallel", split).random(len(group))
        _, first, member = np.unique(group, return_index=True, return_inverse=True)
        order = np.lexsort((member, draws[first][member]))
        order = order[usable[order]]
        for pool in POOLS:
            rows = order[~np.isin(group[order], taken)][: min(wanted[split], len(order) // 2)]
            taken = np.append(taken, group[rows])
            result[pool, split] = numpy_rng(seed, "parallel", pool, split).permutation(rows)
    return result


def _groups(keys: Sequence[npt.NDArray[np.uint64]]) -> list[Ints]:
    """The group number of each row, (n,) per split: connected components of rows and premises."""
    sizes = [k.shape[1] for k in keys]
    every = np.concatenate(keys, axis=1)
    unique, premise = np.unique(every, return_inverse=True)
    rows = np.tile(np.arange(every.shape[1]), every.shape[0])
    links = (np.ones(len(rows), dtype=np.bool_), (rows, premise.ravel() + every.shape[1]))
    nodes = every.shape[1] + len(unique)
    _, group = connected_components(coo_array(links, shape=(nodes, nodes)), directed=False)
    return [part.astype(np.int64) for part in np.split(group[: sum(sizes)], np.cumsum(sizes)[:-1])]


def _examples(pairs: pa.Table, rows: npt.NDArray[np.int64]) -> list[Example]:
    columns = pairs.take(rows).to_pydict()
    return list(map(Example, columns["premise"], columns["label"], columns["hypothesis"]))


ENTRY = TaskEntry(
    load,
    "classification",
    defaults={"languages": XNLI_LANGUAGES, "clients_per_language": 20, "max_length": 128},
)
