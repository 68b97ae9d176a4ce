"""FedLLM-Bench's file of Fed-Aya: where it is, its clients' rows, and the languages that rows name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fedtailor.core.errors import DataError
from fedtailor.core.task_settings import FED_AYA_LANGUAGES
from fedtailor.tasks.local_files import read_text
from fedtailor.tasks.locales import FED_AYA
from fedtailor.tasks.row_files import Row, find_file, parse_json

FILE = "aya_38c_25k.json"

_NAMES = {
    "arabic": "ar", "standard arabic": "ar", "english": "en", "spanish": "es", "french": "fr", "portuguese": "pt",
    "russian": "ru", "telugu": "te", "chinese": "zh", "simplified chinese": "zh",
}  # fmt: skip
CODES: Mapping[str, str] = {code: code for code in FED_AYA_LANGUAGES} | FED_AYA | _NAMES
"""Code or English name in lower case -> ISO 639-1 code."""

_LANGUAGE_KEYS = ("language", "lang", "language_code")
_RENAMED = {"inputs": "instruction", "targets": "response"}
"""Names that the Aya data set, which Fed-Aya is made from, has for the same fields."""

_HOW_TO_GET_IT = (
    f"Fed-Aya is part of FedLLM-Bench's data, whose download is linked at https://github.com/rui-ye/FedLLM-Bench; "
    f"set task.path to its Fed-Aya/{FILE}, or put that file into fed_aya/ in the folder that FEDTAILOR_DATA names"
)


def language_code(name: str) -> str:
    """ISO 639-1 code of one of the 8 languages, from its code or English name; another name in lower case.

    >>> language_code("Simplified_Chinese"), language_code("arb"), language_code("te"), language_code("Hindi")
    ('zh', 'ar', 'te', 'hindi')
    """
    key = " ".join(name.replace("_", " ").split()).lower()
    return CODES.get(key, key)


def language_of(row: Row) -> str:
    """What `language_code` makes of the language that a row names.

    Raises:
        DataError: it names none.
    """
    value = next((row.values[key] for key in _LANGUAGE_KEYS if row.values.get(key)), None)
    if not isinstance(value, str):
        keys = ", ".join(row.values)
        raise DataError(f"{row.where}: no language; one of {', '.join(_LANGUAGE_KEYS)} is needed, keys: {keys}")
    return language_code(value)


def find(path: str | None) -> Path:
    """The file: `path` (``task.path``, the file or its folder), else $FEDTAILOR_DATA/fed_aya.

    Raises:
        DataError: it is not there; says where to get it.
    """
    try:
        file = find_file(path, "fed_aya", (FILE,))
    except DataError as error:
        raise DataError(f"{error}. {_HOW_TO_GET_IT}") from error
    if file is None:
        raise DataError(f"the data of task=fed_aya are not on this machine. {_HOW_TO_GET_IT}")
    return file


def read_clients(path: Path) -> dict[str, list[Row]]:
    """Client -> its rows, in the file's order; a client's name is its number from 0, as `client_name` writes it.

    Raises:
        DataError: damaged, or not an object client -> list of rows, nor a list of such lists; names client and row.
    """
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, (dict, list)) or not content:
        raise DataError(f"{path}: expected an object client -> list of rows, or a list of such lists")
    named = [(f" ({key!r})", rows) for key, rows in content.items()] if isinstance(content, dict) else None
    clients = {}
    for number, (key, rows) in enumerate(named or [("", rows) for rows in content]):
        clients[client_name(number, len(content))] = list(read_list(rows, f"{path}, client {number}{key}"))
    return clients


def client_name(number: int, clients: int) -> str:
    """A client's number, padded so that names sort by number.

    >>> client_name(7, 38), client_name(7, 1000)
    ('07', '007')
    """
    return f"{number:0{max(2, len(str(clients - 1)))}d}"


def read_list(rows: Any, where: str) -> Iterator[Row]:
    """The rows of a list of objects.

    Raises:
        DataError: not a list, or something else in it.
    """
    if not isinstance(rows, list):
        raise DataError(f"{where}: expected a list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{where}, row {number}: a row must be an object, found {type(row).__name__}")
        yield Row(f"{where}, row {number}", {str(_RENAMED.get(key, key)): field for key, field in row.items()})
