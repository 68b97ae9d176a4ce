"""Task ``webnlg``: sentences from RDF triples (WebNLG challenge 2017, Gardent et al. 2017; CC BY-NC-SA 4.0).

``task.path``, else $FEDTAILOR_DATA/webnlg, is a folder with a file of JSON lines for train and test (keys ``category``,
``triples``, ``lexs``), or with the challenge's own XML files below ``train/`` and ``test/``. A train row is a set of
triples with one of its sentences; a test set is asked once and has all of them as references. Of the test sets those of
the ten categories that are in the train files are kept, as in PF2LoRA.

Clients are PF2LoRA's (Hao et al. 2025, 6.1.3): eight for ten domains. Which share one the paper does not say; by
alphabet the two that its examples leave out (Table 18) join their smaller neighbours, see `CLIENTS`, and
``task.domains`` says otherwise, e.g. ``[Airport,Astronaut+City,...]``. Results are reported by domain.

Inputs become ``Aarhus Airport : city served : Aarhus, Denmark | ...``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

import regex

from fedtailor.core.errors import ConfigError, DataError, did_you_mean, reported_as
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.instructions import predominant
from fedtailor.tasks.partition import LabelledSplit, natural_clients
from fedtailor.tasks.places import data_place, first_file
from fedtailor.tasks.rows import Row, read_rows
from fedtailor.tasks.source import SPLITS, Example, Source, Split, TaskEntry

CLIENTS: Final = (
    "Airport", "Astronaut", "Building+City", "ComicsCharacter", "Food+Monument", "SportsTeam", "University",
    "WrittenWork",
)  # fmt: skip
DOMAINS: Final = tuple(sorted(domain for client in CLIENTS for domain in client.split("+")))

_WORD_IN_NAME: Final = regex.compile(r"(?<=\p{Ll})(?=\p{Lu})")


def load(cfg: TaskConfig, seed: int) -> Source:
    """All sets of triples by client.

    Args:
        cfg: `path`, `domains`, `max_examples`, `unseen` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: ``task.domains`` leaves a domain out, names one twice, or one that there is not.
        DataError: no files, a damaged one, or an entry without category, triples or sentence (names file and place).
    """
    clients = _owners(cfg.domains or CLIENTS)
    held: dict[str, list[LabelledSplit]] = {name: [] for name in dict.fromkeys(clients.values())}
    others = 0
    for split in SPLITS:
        for row in _rows(cfg.path, split):
            domain, text, sentences = _entry(row)
            if domain not in clients:
                others += 1
                continue
            label = DOMAINS.index(domain)
            if split == "train":
                examples = [Example(text, label, sentence) for sentence in sentences]
            else:
                examples = [Example(text, label, sentences[0], None, tuple(sentences[1:]))]
            held[clients[domain]] += [LabelledSplit(example, split) for example in examples]
    found = natural_clients(held, predominant(DOMAINS), cfg, seed)
    notes = {"sets_of_other_categories": others}
    return Source(DOMAINS, notes=notes, kind="generation", natural_clients=tuple(found))


def _owners(clients: Sequence[str]) -> dict[str, str]:
    """Domain to the client that has it."""
    named = [(domain.strip(), client) for client in clients for domain in client.split("+")]
    given = [domain for domain, _ in named]
    problems = [
        f"'task.domains' has {domain!r}, no domain of webnlg; allowed: {', '.join(DOMAINS)}"
        f"{did_you_mean(domain, DOMAINS)}"
        for domain in dict.fromkeys(given)
        if domain not in DOMAINS
    ]
    problems += [f"'task.domains' has {domain!r} {given.count(domain)} times" for domain in set(given) & set(DOMAINS)
                 if given.count(domain) > 1]  # fmt: skip
    if missing := [domain for domain in DOMAINS if domain not in given]:
        problems.append(f"'task.domains' leaves out {', '.join(missing)}; join them to a client with +")
    if problems:
        raise ConfigError(problems)
    return dict(named)


def _rows(path: str | None, split: Split) -> Iterator[Row]:
    place, origin = data_place(path, "webnlg")
    if place is None or not place.is_dir():
        where = "the data of task=webnlg are not on this machine" if place is None else f"{origin}: no folder {place}"
        raise DataError(
            f"{where}. Set task.path to the folder of the WebNLG challenge 2017 (XML files below train/ and test/, or "
            "challenge2017_train.jsonl and challenge2017_test.jsonl), or FEDTAILOR_DATA to the folder that has it"
        )
    if file := first_file(place, (f"challenge2017_{split}.jsonl", f"{split}.jsonl")):
        return read_rows(file)
    files = sorted((place / split).rglob("*.xml"))
    if not files:
        raise DataError(f"{origin}: {place} has neither challenge2017_{split}.jsonl nor XML files below {split}/")
    return (row for file in files for row in _xml(file))


def _xml(path: Path) -> Iterator[Row]:
    """The entries of one of the challenge's files, with the modified triples, which the sentences were written for."""
    with reported_as(DataError, f"{path}: damaged XML file", OSError, ElementTree.ParseError):
        entries = ElementTree.parse(path).getroot().iter("entry")
    for entry in entries:
        triples = [(triple.text or "").split(" | ") for triple in entry.iterfind("modifiedtripleset/mtriple")]
        sentences = [lex.text or "" for lex in entry.iterfind("lex")]
        values: dict[str, Any] = {"category": entry.get("category"), "triples": triples, "lexs": sentences}
        yield Row(f"{path}, entry {entry.get('eid')}", values)


def _entry(row: Row) -> tuple[str, str, list[str]]:
    domain, triples = row.values.get("category"), row.values.get("triples")
    sentences: list[Any] = row.values.get("lexs") or []
    if not isinstance(domain, str):
        raise DataError(f"{row.where}: no 'category' (keys: {', '.join(map(str, row.values))})")
    three = isinstance(triples, list) and all(isinstance(triple, list) and len(triple) == 3 for triple in triples)
    if not triples or not three:
        raise DataError(f"{row.where}: 'triples' must be a list of [subject, predicate, object]")
    texts = [" ".join(str(sentence).split()) for sentence in sentences]
    if not (texts := [text for text in texts if text]):
        raise DataError(f"{row.where}: no reference ('lexs'), without which nothing can be learned or scored")
    return domain, " | ".join(" : ".join(map(_part, triple)) for triple in triples), texts


def _part(text: str) -> str:
    """A name as words: ``cityServed`` and ``Aarhus_Airport`` and ``"Aarhus, Denmark"`` in their plain forms."""
    plain = " ".join(str(text).strip().strip('"').replace("_", " ").split())
    return plain if " " in plain else _WORD_IN_NAME.sub(" ", plain)


ENTRY = TaskEntry(
    load,
    "generation",
    clients="natural",
    defaults={"max_length": 256, "template": "plain", "languages": DOMAINS},
    published_clients=8,
)
