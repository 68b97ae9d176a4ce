"""A user's own table: a file, a folder of files or one that the ``datasets`` library saved, or a data set of the hub.

One rule says which split a row belongs to. The name of a file in a folder (``train-00000-of-00001.parquet``,
``Train.csv``, ``reviews_test.csv``, ``dev.tsv``), else the name of the folder that it lies in, holds one of
`SPLIT_WORDS` as a word of its own; or a column holds it. Rows of ``validation`` are for test where no rows of ``test``
are there, and are left out where they are: they are never trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from fedtailor.core.errors import ConfigError, DataError, listed
from fedtailor.tasks.columns import find_column
from fedtailor.tasks.config import AUTO, TaskConfig
from fedtailor.tasks.rows import ENDINGS, Row, hub_name, is_table, load_hub, plain_row, read_rows
from fedtailor.tasks.source import Split

Part = Literal["train", "validation", "test"]
"""A split as data sets name it."""

SPLIT_WORDS: Final[Mapping[str, Part]] = {
    "train": "train", "training": "train", "trainset": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
    "test": "test", "testing": "test", "testset": "test",
}  # fmt: skip
"""Words, in any case, by which files and rows say their split."""

METADATA: Final = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files beside the data that describe it."""

_HUB = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?)(:(?P<config>[\w.-]+))?")
_SAVED = ("dataset_dict.json", "state.json")


@dataclass(frozen=True)
class OwnTable:
    """Rows that can be used, in their order.

    Args:
        rows: cells by column.
        splits: of each row; None in all or none: the data do not say.
        notes: ``rows_read``, how the rows were split, and how many were left out.
    """

    rows: Sequence[Row]
    splits: Sequence[Split | None]
    notes: Mapping[str, int | str]

    @property
    def columns(self) -> list[str]:
        """Names of the columns, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row.values))


def own_table(cfg: TaskConfig, named: str = "'task.path'") -> OwnTable:
    """Reads the table of ``task.path``.

    Args:
        cfg: `path`, `split`, `split_column` and `test_fraction` are used.
        named: the key or option that named it, for messages.

    Raises:
        ConfigError: no ``task.path``, or one that is neither there nor a hub id.
        DataError: a damaged file, a split that is unknown or known of some rows only, or no row to train on; names file
            and row.
    """
    rows, parts = [], []
    for row, part in placed_rows(cfg, named):
        rows.append(row)
        parts.append(part)
    parts = _by_column(rows, parts, cfg, "task.split_column=null" if named == "'task.path'" else "--split none")
    found = set(parts)
    if None in found and len(found) > 1:
        where = rows[parts.index(None)].where
        raise DataError(f"{where}: no split, but other rows have one; it is needed in all rows or none")
    notes: dict[str, int | str] = {"rows_read": len(rows)}
    if found <= {None, "train"}:  # what says ``train`` of every row says nothing
        notes["split"] = f"{cfg.test_fraction:g} of every client for test"
        return OwnTable(rows, [None] * len(rows), notes)
    if "train" not in found:
        raise DataError(
            f"{cfg.path}: no row to train on: all {len(rows)} are of {' or '.join(sorted(map(str, found)))}"
        )
    notes["split"] = "of the data"
    if "test" not in found:
        notes["split"] = "of the data, validation for test"
    elif left_out := parts.count("validation"):
        notes["dropped_validation_rows"] = left_out
    kept: list[tuple[Row, Split | None]] = [
        (row, "train" if part == "train" else "test")
        for row, part in zip(rows, parts, strict=True)
        if part != "validation" or "test" not in found
    ]
    return OwnTable([row for row, _ in kept], [split for _, split in kept], notes)


def placed_rows(cfg: TaskConfig, named: str = "'task.path'") -> Iterator[tuple[Row, Part | None]]:
    """Rows, and the split that their file or data set says; see `own_table`."""
    if cfg.path is None:
        raise ConfigError(
            f"task={cfg.name} needs {named}: a file or folder ({', '.join(ENDINGS)}), "
            "or the id of a data set on the Hugging Face hub (owner/name)"
        )
    place, hub = Path(cfg.path).expanduser(), _HUB.fullmatch(cfg.path)
    if place.is_file():
        yield from ((row, None) for row in read_rows(place))
    elif place.is_dir():
        yield from folder_rows(place)
    elif cfg.path.startswith((".", "/", "~")) or is_table(place) or not hub:
        raise ConfigError(f"{named} is {cfg.path!r}: no such file or folder, nor an id on the hub (owner/name)")
    else:
        name = [part for part in (hub["id"], hub["config"]) if part]
        found = load_hub(*name, split=cfg.split)
        yield from ((row, None) for row in dataset_rows(found, hub_name(*name, split=cfg.split)))


def folder_rows(folder: Path) -> Iterator[tuple[Row, Part | None]]:
    """Rows of all files of a folder, file after file by name, and the split that each file's name says.

    Raises:
        DataError: see `data_files` and `rows.read_rows`.
    """
    if is_saved(folder):
        yield from _saved_rows(folder)
        return
    for path, part in data_files(folder):
        yield from ((row, part) for row in read_rows(path))


def is_saved(folder: Path) -> bool:
    """Whether the ``datasets`` library saved a folder (`datasets.Dataset.save_to_disk`)."""
    return any((folder / name).is_file() for name in _SAVED)


def data_files(folder: Path) -> list[tuple[Path, Part | None]]:
    """The files of a folder that hold data, by name, and their splits; those of its folders, if it has none itself.

    Hidden files, READMEs and `METADATA` hold none.

    Raises:
        DataError: there is none, one names two splits, or some name a split and some do not.
    """
    files = [path for path in sorted(folder.iterdir()) if _holds_data(path)]
    inside = sorted(folder.rglob("*")) if not files else []
    files += [path for path in inside if _holds_data(path) and not _hidden(path.relative_to(folder).parts)]
    if not files:
        raise DataError(f"{folder}: holds no file that ends in {', '.join(ENDINGS)} (each also with .gz)")
    placed = [(path, part_of_file(path, folder)) for path in files]
    with_split = [str(path.relative_to(folder)) for path, part in placed if part]
    without = [str(path.relative_to(folder)) for path, part in placed if not part]
    if with_split and without:
        raise DataError(
            f"{folder}: the names of some files say their split ({listed(with_split)}), those of others do not "
            f"({listed(without)}). Put train, validation or test into every name, set apart by '-', '_' or '.', take "
            "away what is no data, or give task.path one file"
        )
    return placed


def part_of_file(path: Path, folder: Path) -> Part | None:
    """The split that a file's name says, else the name of the nearest folder below `folder` that does.

    Raises:
        DataError: a name says two.

    >>> part_of_file(Path("d/train-00000-of-00001.jsonl.gz"), Path("d")), part_of_file(Path("d/Dev.tsv"), Path("d"))
    ('train', 'validation')
    >>> part_of_file(Path("d/test/part1.csv"), Path("d")), part_of_file(Path("d/testimonials.csv"), Path("d"))
    ('test', None)
    """
    for name in reversed(path.relative_to(folder).parts):
        apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # trainData
        parts = {SPLIT_WORDS[word] for word in re.split(r"[\W\d_]+", apart.casefold()) if word in SPLIT_WORDS}
        if len(parts) > 1:
            raise DataError(f"{path}: the name says two splits, {' and '.join(sorted(parts))}; rename it to say one")
        if parts:
            return parts.pop()
    return None


def dataset_rows(found: Any, name: str) -> Iterator[Row]:
    """Rows of a ``datasets.Dataset``; a cell of a `datasets.ClassLabel` is its name, None where it is -1."""
    classes = {
        column: feature.names
        for column, feature in (getattr(found, "features", None) or {}).items()
        if type(feature).__name__ == "ClassLabel"
    }
    for number, values in enumerate(found):
        named = {
            column: names[cell] if (cell := values[column]) is not None and cell >= 0 else None
            for column, names in classes.items()
        }
        yield plain_row({**values, **named}, f"{name}, row {number}")


def _saved_rows(folder: Path) -> Iterator[tuple[Row, Part | None]]:
    from datasets import DatasetDict, load_from_disk  # half a second that only this path needs

    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # the library lets OSError, ValueError and its own errors through
        raise DataError(f"{folder}: not a data set that was saved whole: {type(error).__name__}: {error}") from error
    for name, one in found.items() if isinstance(found, DatasetDict) else [(None, found)]:
        part = None if name is None else part_of_file(folder / name, folder)
        yield from ((row, part) for row in dataset_rows(one, str(folder if name is None else folder / name)))


def _holds_data(path: Path) -> bool:
    name = path.name
    return is_table(path) and name not in METADATA and not _hidden([name]) and path.is_file()


def _hidden(names: Sequence[str]) -> bool:
    return any(name.startswith((".", "_")) or name.upper().startswith("README") for name in names)


def _by_column(rows: Sequence[Row], parts: list[Part | None], cfg: TaskConfig, ignoring: str) -> list[Part | None]:
    """The splits with those that a column says; it may not say another one than the file's name.

    `ignoring` is what a user would say so that no column is read.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row.values))
    column = find_column(columns, ["split"]) if cfg.split_column == AUTO else cfg.split_column
    if column is None:
        return parts
    if column not in columns:
        key = ignoring.removesuffix("=null").removesuffix(" none")
        raise DataError(f"{cfg.path}: no column {column!r} ({key}); columns there: {', '.join(columns)}")
    found: list[Part | None] = []
    for row, of_file in zip(rows, parts, strict=True):
        cell = row.values.get(column)
        word = "" if cell is None else str(cell).strip().casefold()
        part = SPLIT_WORDS.get(word)
        if word and part is None:
            raise DataError(
                f"{row.where}: {column!r} is {cell!r}; allowed: {', '.join(SPLIT_WORDS)} ({ignoring} if it says "
                "something else)"
            )
        if part and of_file and part != of_file:
            raise DataError(f"{row.where}: {column!r} is {cell!r}, and the file's name says {of_file}")
        found.append(part or of_file)
    return found
