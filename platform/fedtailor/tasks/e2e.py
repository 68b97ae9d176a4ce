"""Task ``e2e``: descriptions of restaurants from their attributes (E2E NLG challenge, Novikova et al. 2017).

``task.path``, else $FEDTAILOR_DATA/e2e, is a folder with the challenge's ``trainset.csv`` (or its tokenised form) and
``testset_w_refs.csv``, columns ``mr`` and ``ref``. A train row is an input with one reference; a test input is asked
once and has all its references.

Clients are PF2LoRA's (Hao et al. 2025, 6.1.3): the names of restaurants in alphabetical order, cut into
``task.clients_per_language`` blocks of about equal numbers of test inputs, which puts the eight that the paper shows
(Table 20: Blue Spice, The Cricketers, The Mill, ...) into the blocks in that order. Names that are in no test input
stay with their alphabetical neighbours. A client is called by the name that most of its test inputs have.

Inputs become ``name : Blue Spice | eatType : coffee shop``. The tokenised train file and the original test file differ
in blanks around punctuation, so that both are written alike here (`spaced`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

import regex

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import LabelledSplit, natural_clients
from fedtailor.tasks.places import data_file
from fedtailor.tasks.rows import Row, read_rows
from fedtailor.tasks.source import Example, Source, Split, TaskEntry, spaced

FILES: Final[Mapping[Split, tuple[str, ...]]] = {
    "train": ("trainset.csv", "trainset_tokenised.csv"),
    "test": ("testset_w_refs.csv",),
}

_ATTRIBUTE: Final = regex.compile(r"([^,\[\]]+)\[([^\]]*)\]")


def load(cfg: TaskConfig, seed: int) -> Source:
    """All inputs by client.

    Args:
        cfg: `path`, `clients_per_language`, `max_examples`, `unseen` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: more clients than names.
        DataError: a missing or damaged file, or a row without an input, a name or a reference (names file and line).
    """
    rows = {split: _read(data_file(cfg.path, "e2e", names), split) for split, names in FILES.items()}
    names = {name for found in rows.values() for name, _ in found}
    if cfg.clients_per_language > len(names):
        raise ConfigError(
            f"'task.clients_per_language' is {cfg.clients_per_language}, and there are {len(names)} restaurants in e2e "
            f"(allowed: 1 ... {len(names)})"
        )
    tests = Counter(name for name, _ in rows["test"])
    blocks = cut(names, tests, cfg.clients_per_language)
    titles = [max(block, key=lambda name: (tests[name], name)) for block in blocks]
    owner = {name: label for label, block in enumerate(blocks) for name in block}
    held: dict[str, list[LabelledSplit]] = {title: [] for title in titles}
    for split, found in rows.items():
        for name, example in found:
            label = owner[name]
            held[titles[label]].append(LabelledSplit(example._replace(label=label), split))
    clients = natural_clients(held, lambda name, _: name, cfg, seed)
    notes = {f"{split}_rows": len(found) for split, found in rows.items()}
    return Source(tuple(titles), notes=notes, kind="generation", natural_clients=tuple(clients))


def cut(names: Iterable[str], weights: Mapping[str, int], blocks: int) -> list[list[str]]:
    """Names in alphabetical order in so many blocks of about equal weight: each goes where the middle of its own lies.

    >>> cut("abcd", {"a": 1, "b": 1, "c": 2, "d": 0}, 2)
    [['a', 'b'], ['c', 'd']]
    """
    found: list[list[str]] = [[] for _ in range(blocks)]
    ordered, before, total = sorted(names, key=str.casefold), 0, sum(weights.values())
    for name in ordered:
        middle = before + weights.get(name, 0) / 2
        found[min(blocks - 1, int(blocks * middle / total))].append(name)
        before += weights.get(name, 0)
    if not all(found):
        empty = ", ".join(str(number) for number, block in enumerate(found, start=1) if not block)
        raise ConfigError(
            f"'task.clients_per_language' is {blocks}: of so many blocks of about equal weight number {empty} gets "
            "no restaurant; take fewer"
        )
    return found


def _read(path: Path, split: Split) -> list[tuple[str, Example]]:
    """Each example with its restaurant; test rows of one input are one example."""
    found: dict[str, tuple[str, list[str]]] = {}
    train = []
    for row in read_rows(path):
        name, text = _input(row)
        reference = row.values.get("ref")
        if not isinstance(reference, str) or not reference.strip():
            raise DataError(f"{row.where}: no reference ('ref'), without which nothing can be learned or scored")
        if split == "train":
            train.append((name, Example(text, 0, spaced(reference))))
        else:
            found.setdefault(text, (name, []))[1].append(spaced(reference))
    tests = [(name, Example(text, 0, first, None, tuple(more))) for text, (name, (first, *more)) in found.items()]
    return train if split == "train" else tests


def _input(row: Row) -> tuple[str, str]:
    attributes = {key.strip(): spaced(value) for key, value in _ATTRIBUTE.findall(str(row.values.get("mr") or ""))}
    if "name" not in attributes:
        keys = ", ".join(map(str, row.values))
        raise DataError(f"{row.where}: 'mr' has no attribute name[...], by which clients are made (columns: {keys})")
    return attributes["name"], " | ".join(f"{key} : {value}" for key, value in attributes.items())


ENTRY = TaskEntry(
    load,
    "generation",
    clients="natural",
    defaults={"max_length": 256, "clients_per_language": 8, "template": "plain", "languages": ("en",)},
    published_clients=8,
)
