"""Task ``fed_aya``: instructions in many languages by the people who wrote them (FedLLM-Bench, arXiv 2406.04845).

The file is FedLLM-Bench's ``aya_38c_25k.json``; a client's number is its place there, from 0. As in FedP2EFT (section
4.1.1, A.1), 8 languages are kept, clients 21 to 27 and 34 are unseen, and every client is split 80 % / 20 % into train
and test. Results are reported by the language of each example; a client's own language is the one that most of its
examples have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedtailor.core.errors import ConfigError, DataError, did_you_mean
from fedtailor.tasks.cldr import FED_AYA
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.instructions import is_complete, none_dropped, predominant, read_example
from fedtailor.tasks.partition import MIN_EXAMPLES, LabelledSplit, check_unseen, natural_clients
from fedtailor.tasks.places import find_file
from fedtailor.tasks.rows import Row, list_rows, parse_json, read_text
from fedtailor.tasks.source import Source, TaskEntry

FED_AYA_LANGUAGES: tuple[str, ...] = ("ar", "en", "es", "fr", "pt", "ru", "te", "zh")
"""ISO 639-1 codes of the languages that FedP2EFT keeps of Fed-Aya (A.1)."""

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
        clients[client_name(number, len(content))] = [
            _renamed(row) for row in list_rows(rows, f"{path}, client {number}{key}")
        ]
    return clients


def _renamed(row: Row) -> Row:
    return Row(row.where, {_RENAMED.get(key, key): field for key, field in row.values.items()})


def client_name(number: int, clients: int) -> str:
    """A client's number, padded so that names sort by number.

    >>> client_name(7, 38), client_name(7, 1000)
    ('07', '007')
    """
    return f"{number:0{max(2, len(str(clients - 1)))}d}"


def load(cfg: TaskConfig, seed: int) -> Source:
    """The clients of Fed-Aya from ``task.path``, else $FEDTAILOR_DATA/fed_aya.

    Rows in other languages than ``task.languages``, and rows without a response or an instruction, are dropped and
    counted. A client that has too few examples in these languages, but enough in all, is left out and named.

    Args:
        cfg: `path`, `languages` (codes, or English names such as ``Telugu``), `unseen`, `test_fraction`,
            `max_examples` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: a language twice, or one that occurs nowhere in the file.
        DataError: no file (says where to get it), a damaged file, a row of another shape (names client and row), a
            client with too few examples, or an unseen client that does not exist.
    """
    path = _find(cfg.path)
    clients = read_clients(path)
    examples = {name: [(language_of(row), read_example(row)) for row in rows] for name, rows in clients.items()}
    counts = Counter(language for rows in examples.values() for language, _ in rows)
    languages = _languages(cfg.languages, counts, path)
    unseen = [client_name(int(name), len(clients)) if name.isdecimal() else name for name in cfg.unseen]
    check_unseen(unseen, clients)
    dropped = none_dropped()
    held = {
        name: [
            LabelledSplit(example._replace(label=languages.index(language)))
            for language, example in rows
            if language in languages and is_complete(example, dropped)
        ]
        for name, rows in examples.items()
    }
    few = [
        name
        for name, kept in held.items()
        if len(kept) < MIN_EXAMPLES <= sum(is_complete(example, Counter()) for _, example in examples[name])
    ]
    kept = {name: found for name, found in held.items() if name not in few}
    if not kept:
        raise DataError(f"{path}: no client has {MIN_EXAMPLES} examples in {', '.join(languages)} (task.languages)")
    notes: dict[str, int | str] = {
        "rows_read": counts.total(),
        "dropped_other_languages": sum(n for code, n in counts.items() if code not in languages),
        **dropped,
        "clients_without_these_languages": ", ".join(few) or "none",
    }
    cfg = cfg.model_copy(update={"unseen": tuple(name for name in unseen if name in kept)})
    found = natural_clients(kept, predominant(languages), cfg, seed)
    return Source(labels=languages, notes=notes, kind="generation", natural_clients=tuple(found))


def _find(path: str | None) -> Path:
    try:
        if file := find_file(path, "fed_aya", (FILE,)):
            return file
    except DataError as error:
        raise DataError(f"{error}. {_HOW_TO_GET_IT}") from error
    raise DataError(f"the data of task=fed_aya are not on this machine. {_HOW_TO_GET_IT}")


def _languages(names: Sequence[str], found: Mapping[str, int], path: Path) -> tuple[str, ...]:
    """The codes of ``task.languages``, each once and each in the file."""
    codes = tuple(map(language_code, names))
    twice = sorted(code for code, n in Counter(codes).items() if n > 1)
    if twice:
        raise ConfigError(f"'task.languages' ({', '.join(names)}) names a language twice: {', '.join(twice)}")
    there = ", ".join(sorted(found))
    problems = [
        f"'task.languages' has {code!r}, which no row of {path} has; allowed: {there}"
        f"{did_you_mean(code, [*found, *CODES])}"
        for code in codes
        if code not in found
    ]
    if problems:
        raise ConfigError(problems)
    return codes


ENTRY = TaskEntry(
    load,
    "generation",
    clients="natural",
    defaults={
        "languages": FED_AYA_LANGUAGES,
        "max_length": 1024,
        "test_fraction": 0.2,
        "unseen": ("21", "22", "23", "24", "25", "26", "27", "34"),
    },
    published_clients=38,
)
