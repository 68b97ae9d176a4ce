"""Task ``fed_aya``: instructions in many languages by the people who wrote them (FedLLM-Bench, arXiv 2406.04845).

The file is FedLLM-Bench's ``aya_38c_25k.json``; a client's number is its place there, from 0. As in FedP2EFT (section
4.1.1, A.1), 8 languages are kept, clients 21 to 27 and 34 are unseen, and every client is split 80 % / 20 % into train
and test. Results are reported by the language of each example; a client's own language is the one that most of its
examples have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtailor.core.errors import ConfigError, DataError, did_you_mean
from fedtailor.tasks.cldr import FED_AYA
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.instruction_rows import Dropped, read_turn
from fedtailor.tasks.partition import MIN_EXAMPLES, LabelledSplit, check_unseen, natural_clients
from fedtailor.tasks.rows import Row, list_rows, parse_json, read_text
from fedtailor.tasks.source import Example, Source, TaskEntry, find_file

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


EVALUATION_FILE = "test_datasets.json"


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


@dataclass(frozen=True)
class EvaluationPrompt:
    """One open-ended question of FedLLM-Bench's evaluation of Fed-Aya.

    Args:
        language: ISO 639-1 code.
        instruction: the question.
        reference: an answer by a person.
    """

    language: str
    instruction: str
    reference: str


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
    languages = _languages(cfg.languages)
    path = find(cfg.path)
    clients = read_clients(path)
    counts = Counter(language_of(row) for rows in clients.values() for row in rows)
    _check_languages(languages, counts, path)
    unseen = [client_name(int(name), len(clients)) if name.isdecimal() else name for name in cfg.unseen]
    check_unseen(unseen, clients)
    dropped = Dropped()
    held = {name: _held(rows, languages, dropped) for name, rows in clients.items()}
    few = [name for name in held if len(held[name]) < MIN_EXAMPLES <= _usable(clients[name])]
    kept = {name: examples for name, examples in held.items() if name not in few}
    if not kept:
        raise DataError(f"{path}: no client has {MIN_EXAMPLES} examples in {', '.join(languages)} (task.languages)")
    notes: dict[str, int | str] = {
        "rows_read": counts.total(),
        "dropped_other_languages": sum(n for code, n in counts.items() if code not in languages),
        **dropped.notes,
        "clients_without_these_languages": ", ".join(few) or "none",
    }
    cfg = cfg.model_copy(update={"unseen": tuple(name for name in unseen if name in kept)})
    found = natural_clients(kept, languages, cfg, seed)
    return Source(labels=languages, notes=notes, kind="generation", natural_clients=tuple(found))


def evaluation_prompts(path: Path | str | None = None) -> tuple[EvaluationPrompt, ...]:
    """FedLLM-Bench's open-ended evaluation prompts of Fed-Aya, 20 in each of 8 languages, in the file's order.

    Args:
        path: the file ``test_datasets.json`` or ``.json.gz``, or its folder; default: $FEDTAILOR_DATA/fed_aya_eval.

    Raises:
        DataError: no such file (says where to get it), or a damaged one.
    """
    file = find_file(None if path is None else str(path), "fed_aya_eval", (EVALUATION_FILE,))
    if file is None:
        raise DataError(
            f"the evaluation prompts of Fed-Aya are evaluation/open_ended/aya_evaluation/{EVALUATION_FILE} of "
            "https://github.com/rui-ye/FedLLM-Bench; put that file into fed_aya_eval/ in the folder that "
            "FEDTAILOR_DATA names"
        )
    content = parse_json(read_text(file), str(file))
    if not isinstance(content, dict):
        raise DataError(f"{file}: expected an object language -> list of prompts, found {type(content).__name__}")
    return tuple(
        _prompt(language_code(language), row)
        for language, rows in content.items()
        for row in list_rows(rows, f"{file}, language {language!r}")
    )


def _prompt(language: str, row: Row) -> EvaluationPrompt:
    instruction, reference = row.values.get("instruction"), row.values.get("reference")
    if isinstance(instruction, str) and isinstance(reference, str) and instruction.strip() and reference.strip():
        return EvaluationPrompt(language, instruction, reference)
    raise DataError(f"{row.where}: a prompt has a text 'instruction' and a text 'reference'")


def _languages(names: Sequence[str]) -> tuple[str, ...]:
    codes = tuple(map(language_code, names))
    twice = sorted(code for code, n in Counter(codes).items() if n > 1)
    if twice:
        raise ConfigError(f"'task.languages' ({', '.join(names)}) names a language twice: {', '.join(twice)}")
    return codes


def _check_languages(languages: Sequence[str], found: Mapping[str, int], path: Path) -> None:
    problems = []
    for language in languages:
        if language not in found:
            hint = did_you_mean(language, [*found, *CODES])
            there = ", ".join(sorted(found))
            problems.append(f"'task.languages' has {language!r}, which no row of {path} has; allowed: {there}{hint}")
    if problems:
        raise ConfigError(problems)


def _held(rows: Sequence[Row], languages: Sequence[str], dropped: Dropped) -> list[LabelledSplit]:
    """A client's usable examples in these languages."""
    held = []
    for row in rows:
        language, turn = language_of(row), read_turn(row)
        if language in languages and dropped.keeps(turn):
            held.append(LabelledSplit(Example(turn.text, languages.index(language), turn.response, turn.history)))
    return held


def _usable(rows: Sequence[Row]) -> int:
    """A client's examples in any language."""
    return sum(map(Dropped().keeps, map(read_turn, rows)))


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
