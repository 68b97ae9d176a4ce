"""Task ``glue``: CoLA, SST-2, QNLI, MNLI or QQP of the GLUE benchmark (Wang et al., 2019), as PF2LoRA uses them.

The labels of GLUE's test sets are hidden, so the dev set is the test set (of MNLI both, matched and mismatched). All
texts go to 8 seen clients whose labels are skewed by ``task.sorted_share``: 0.9 in PF2LoRA, but 0.3 for CoLA (section
6.1.1), whose score is Matthews correlation. The group of all results is the data set, e.g. ``cola``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.places import data_place, first_file
from fedtailor.tasks.rows import Row, hub_rows, read_text
from fedtailor.tasks.source import SPLITS, ClassScore, Example, Source, Split, TaskEntry, one_group

HUB_ID: Final = "nyu-mll/glue"
LANGUAGE: Final = "eng"


class Subset(NamedTuple):
    """One data set of GLUE.

    Args:
        folder: its name in a folder of GLUE.
        labels: class names in the order of the files' and the hub's numbers.
        columns: names of the text, or of the two of a pair, in files.
        label: column of the label in files.
        hub_columns: the texts' names on the hub.
        header: columns of files that have no header.
        dev: dev sets: name of the file to split on the hub.
        score: see `Source.score`.
        skips_damaged: rows with too few columns are left out, as the hub's copy leaves them out.
    """

    folder: str
    labels: tuple[str, ...]
    columns: tuple[str, ...] = ("sentence",)
    label: str = "label"
    hub_columns: tuple[str, ...] = ("sentence",)
    header: tuple[str, ...] = ()
    dev: Mapping[str, str] = {"dev.tsv": "validation"}
    score: ClassScore = "accuracy"
    skips_damaged: bool = False


SUBSETS: Final[Mapping[str, Subset]] = {
    "cola": Subset(
        "CoLA", ("unacceptable", "acceptable"), header=("source", "label", "mark", "sentence"), score="mcc"
    ),
    "sst2": Subset("SST-2", ("negative", "positive")),
    "qnli": Subset(
        "QNLI", ("entailment", "not_entailment"), ("question", "sentence"), hub_columns=("question", "sentence")
    ),
    "mnli": Subset(
        "MNLI", ("entailment", "neutral", "contradiction"), ("sentence1", "sentence2"), "gold_label",
        ("premise", "hypothesis"),
        dev={"dev_matched.tsv": "validation_matched", "dev_mismatched.tsv": "validation_mismatched"},
    ),
    "qqp": Subset(
        "QQP", ("not_duplicate", "duplicate"), ("question1", "question2"), "is_duplicate", ("question1", "question2"),
        skips_damaged=True,
    ),
}  # fmt: skip


def load(cfg: TaskConfig, seed: int) -> Source:
    """Texts or pairs of one data set from ``task.path``, else $FEDTAILOR_DATA/glue, else the hub.

    A folder holds the data set's own folder (``CoLA``, or ``cola``) or is it, with ``train.tsv`` and ``dev.tsv`` as
    GLUE distributes them, each also with ``.gz``; train rows that a copy has split off as ``val.tsv`` are train rows.

    Args:
        cfg: `subset`, `path` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: no data set is named, or languages other than English.
        DataError: missing or damaged file, a file without labels (names file and line), or the hub cannot be reached.
    """
    if cfg.subset is None or cfg.subset not in SUBSETS:
        raise ConfigError(f"'task.subset' names no data set of glue (allowed: {', '.join(SUBSETS)})")
    if cfg.languages != (LANGUAGE,):
        raise ConfigError(f"'task.languages' ({', '.join(cfg.languages)}): glue is in English alone ({LANGUAGE})")
    subset, notes = SUBSETS[cfg.subset], {"dropped_empty": 0, "dropped_damaged": 0, "dropped_duplicates": 0}
    folder = _folder(cfg.path, subset, cfg.subset)
    found: dict[Split, list[Example]] = {}
    for split in SPLITS:
        rows = (
            _hub_examples(subset, cfg.subset, split) if folder is None else _file_examples(folder, subset, split, notes)
        )
        examples = list(rows)
        found[split] = [e for e in examples if e.text.strip() and (e.pair is None or e.pair.strip())]
        notes["dropped_empty"] += len(examples) - len(found[split])
    pools, counts = one_group(cfg.subset, found, seed, cfg.drop_duplicates, "glue", cfg.subset)
    return Source(labels=subset.labels, pools=pools, notes=notes | counts, score=subset.score)


def _folder(path: str | None, subset: Subset, name: str) -> Path | None:
    """The data set's folder; None: it comes from the hub."""
    place, origin = data_place(path, "glue")
    if place is None:
        return None
    own = [folder for folder in (place / subset.folder, place / name, place) if first_file(folder, ("train.tsv",))]
    if own:
        return own[0]
    looked = f"{place / subset.folder}, {place / name} or {place} itself"
    raise DataError(f"{origin}: no train.tsv or train.tsv.gz in {looked}; without a place it is loaded from the hub")


def _hub_examples(subset: Subset, name: str, split: str) -> Iterator[Example]:
    for part in ["train"] if split == "train" else subset.dev.values():
        for row in hub_rows(HUB_ID, name, split=part):
            yield _example(row, subset, subset.hub_columns, "label")


def _file_examples(folder: Path, subset: Subset, split: str, notes: dict[str, int]) -> Iterator[Example]:
    needed = ["train.tsv"] if split == "train" else list(subset.dev)
    for name in [*needed, *(["val.tsv"] if split == "train" else [])]:
        path = first_file(folder, (name,))
        if path is None and name in needed:
            raise DataError(f"{folder}: missing file, one of {name}, {name}.gz")
        for row in _rows(path, subset, notes) if path else ():
            yield _example(row, subset, subset.columns, subset.label)


def _rows(path: Path, subset: Subset, notes: dict[str, int]) -> Iterator[Row]:
    """Rows of a tab-separated file; quotes are letters like others.

    Raises:
        DataError: no column of texts or labels, or a row with another number of columns.
    """
    lines = read_text(path).removesuffix("\n").split("\n")
    header, first = list(subset.header), 1
    if not header:
        header, first = [name.strip() for name in lines.pop(0).split("\t")], 2
    if missing := [name for name in (*subset.columns, subset.label) if name not in header]:
        labels = ", so it holds no labels, as GLUE's test files" if missing == [subset.label] else ""
        raise DataError(f"{path}, line 1: no column {', '.join(missing)}{labels}; header: {', '.join(header)}")
    for number, line in enumerate(lines, start=first):
        fields = line.removesuffix("\r").split("\t")
        if len(fields) == len(header):
            yield Row(f"{path}, line {number}", dict(zip(header, fields, strict=True)))
        elif subset.skips_damaged:
            notes["dropped_damaged"] += 1
        else:
            test = "; a file of two columns, as GLUE's test files, holds no labels" if subset.header else ""
            raise DataError(f"{path}, line {number}: {len(fields)} columns, expected {', '.join(header)}{test}")


def _example(row: Row, subset: Subset, columns: tuple[str, ...], label: str) -> Example:
    """Raises DataError for a label that is missing or unknown."""
    word = str(row.values[label]).strip()
    if word in subset.labels:
        number = subset.labels.index(word)
    elif word.isdecimal() and int(word) < len(subset.labels):
        number = int(word)
    else:
        what = f"unknown label {word!r}" if word not in ("", "-1") else "no label (GLUE's test sets have none)"
        allowed = ", ".join(f"{n} or {name}" for n, name in enumerate(subset.labels))
        raise DataError(f"{row.where}: {what}; allowed: {allowed}")
    texts = [row.values[name] or "" for name in columns]
    return Example(texts[0], number, texts[1] if len(texts) > 1 else None)


ENTRY = TaskEntry(
    load,
    "classification",
    defaults={
        "languages": (LANGUAGE,),
        "subset": "sst2",
        "pools": ("seen",),
        "sorted_share": 0.9,
        "clients_per_language": 8,
        "max_length": 512,
    },
)
