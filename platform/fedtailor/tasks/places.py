"""Where data sets lie: the place that ``task.path`` names, else a folder of $FEDTAILOR_DATA, else the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fedtailor.core.errors import DataError


def find_file(path: str | None, dataset: str, names: Sequence[str]) -> Path | None:
    """The file of a data set, in the place that ``task.path`` (a file or its folder), else $FEDTAILOR_DATA names.

    Args:
        path: ``task.path``.
        dataset: name of the folder in $FEDTAILOR_DATA.
        names: names the file may have, each also with ``.gz``.

    Returns:
        None where neither names a place: the hub may have it.

    Raises:
        DataError: neither a file nor a folder with it; says which key or variable named it, and what was expected.
    """
    place, origin = data_place(path, dataset)
    if place is None or place.is_file():
        return place
    if file := first_file(place, names):
        return file
    what = f"the folder {place} holds none of" if place.is_dir() else f"{place} does not exist; it should hold one of"
    raise DataError(f"{origin}: {what} {_alternatives(names)}")


def data_file(path: str | None, dataset: str, names: Sequence[str]) -> Path:
    """A file as `find_file` finds it, of a data set that is on no hub.

    Raises:
        DataError: see `find_file`; or neither key nor variable names a place.
    """
    if file := find_file(path, dataset, names):
        return file
    raise DataError(
        f"the data of task={dataset} are not on this machine: set task.path to a folder with {_alternatives(names)}, "
        f"or FEDTAILOR_DATA to the folder that has it as {dataset}"
    )


def language_folders(path: str | None, dataset: str) -> Path | None:
    """The folder of a data set with one folder per language, looked for as by `find_file`.

    Raises:
        DataError: the folder does not exist; says which of the two named it.
    """
    place, origin = data_place(path, dataset)
    if place is not None and not place.is_dir():
        raise DataError(f"{origin}: {place} is not a folder; it should hold one folder per language")
    return place


def first_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first file of these names that a folder has, each also with ``.gz``."""
    found = (folder / f"{name}{ending}" for name in names for ending in ("", ".gz"))
    return next((file for file in found if file.is_file()), None)


def language_file(folder: Path, language: str, names: Sequence[str]) -> Path:
    """The first file of these names in a language's folder, each also with ``.gz``.

    Raises:
        DataError: there is none; names folder and files.
    """
    if file := first_file(folder / language, names):
        return file
    raise DataError(f"{folder / language}: missing file, one of {_alternatives(names)}")


def data_place(path: str | None, dataset: str) -> tuple[Path | None, str]:
    """The place of a data set, None: the hub; and what names it, ``task.path`` or ``FEDTAILOR_DATA``."""
    if path is not None:
        return Path(path).expanduser(), "task.path"
    root = os.environ.get("FEDTAILOR_DATA")
    return Path(root) / dataset if root else None, "FEDTAILOR_DATA"


def _alternatives(names: Sequence[str]) -> str:
    return ", ".join(f"{name}{ending}" for name in names for ending in ("", ".gz"))
