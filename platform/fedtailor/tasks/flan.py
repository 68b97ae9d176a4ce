"""Task ``flan``: the two federated data sets that FedDPA took from Flan, 8 tasks each, which pFedGPT uses as well.

Paper: Yang, Long, Shen, Jiang, Blumenstein (FedDPA, NeurIPS 2024); rows of FLAN (Wei et al., 2022). A client of FedDPA
has 300 training rows of one task, and there are 200 test rows of each. ``task.subset`` says which of the data sets; a
copy may lack tasks that their owners do not let others pass on. Clients are made by ``task.dealing``: one task each as
in FedDPA, or Dirichlet shares of all, as in pFedGPT. Results are reported by task.

A task's answers are *labels* where its training rows have few different responses, at most one in ten rows (``yes`` and
``no``; the six kinds of question of TREC). Answers are then also scored by whether they are the right label.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from fedtailor.core.errors import ConfigError, DataError, did_you_mean
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.dealing import check_tasks
from fedtailor.tasks.instructions import is_complete, none_dropped, read_example
from fedtailor.tasks.places import data_place, first_file
from fedtailor.tasks.rows import read_rows
from fedtailor.tasks.source import Example, LanguagePool, Source, TaskEntry, normalise

SUBSETS: Final[Mapping[str, tuple[str, ...]]] = {
    "dataset1": (
        "definite_pronoun_resolution", "snli", "cola", "glue_qqp", "trec", "web_nlg_en", "fix_punct", "wic",
    ),
    "dataset2": (
        "hellaswag", "qnli", "arc_easy", "paws_wiki", "bool_q", "sentiment140", "gigaword", "word_segment",
    ),
}  # fmt: skip
"""Tasks of each data set, in the order of FedDPA's clients."""

ALL: Final = "all"
"""``task.languages``: every task whose training rows are there."""

CLIENTS, TESTS = "8", "flan_test_200_selected_nstrict_1.jsonl"
"""Folder of the clients' files ``local_training_N.json``, and file of all test rows, in a data set's folder."""

ROWS_PER_LABEL: Final = 10


def load(cfg: TaskConfig, seed: int) -> Source:
    """Instructions of one data set from ``task.path``, else $FEDTAILOR_DATA/flan_feddpa; there is no hub for it.

    The place holds the folders ``dataset1`` and ``dataset2`` as in FedDPA's repository, or is one of the two; files may
    be gzipped. Test rows of tasks without training rows are dropped and counted.

    Args:
        cfg: `subset`, `path`, `languages` (the tasks), `dealing` and `clients_per_language` are used.
        seed: run seed; nothing is drawn.

    Raises:
        ConfigError: no data set or dealing is named, an unknown task, or another number of clients than tasks where
            each has one.
        DataError: missing or damaged file, a row of another shape or of a task that the data set has not (names file
            and row), or a task without test rows.
    """
    if cfg.subset is None or cfg.subset not in SUBSETS:
        raise ConfigError(f"'task.subset' names no data set of flan (allowed: {', '.join(SUBSETS)})")
    if cfg.dealing is None:
        raise ConfigError("'task.dealing' says how flan's rows become clients (allowed: task_specific, dirichlet)")
    known = SUBSETS[cfg.subset]
    for task in cfg.languages:
        if task not in (ALL, *known):
            hint = did_you_mean(task, known)
            raise ConfigError(
                f"'task.languages' has {task!r}, no task of {cfg.title}; allowed: {ALL}, {', '.join(known)}{hint}"
            )
    folder, origin = _folder(cfg.path, cfg.subset)
    dropped = none_dropped()
    train = _by_task(_train_files(folder, origin), known, dropped)
    wanted = [task for task in known if task in train and (ALL in cfg.languages or task in cfg.languages)]
    if missing := [task for task in cfg.languages if task not in (ALL, *train)]:
        raise DataError(f"{folder / CLIENTS}: no training rows of {', '.join(missing)} (has: {', '.join(train)})")
    check_tasks(cfg, wanted)
    file = first_file(folder, (TESTS,))
    if file is None:
        raise DataError(f"{folder}: missing file, one of {TESTS}, {TESTS}.gz")
    test = _by_task([file], known, dropped)
    if bare := [task for task in wanted if task not in test]:
        raise DataError(f"{file}: no test rows of {', '.join(bare)}")
    parts = [[e._replace(label=k) for k, task in enumerate(wanted) for e in part[task]] for part in (train, test)]
    notes = {
        **dropped,
        "dropped_tests_of_absent_tasks": sum(len(own) for task, own in test.items() if task not in train),
    }
    answers = {task: found for task in wanted if (found := label_answers(train[task]))}
    return Source(
        tuple(wanted), {"seen": {cfg.subset: LanguagePool(*parts)}}, notes, kind="generation", label_answers=answers
    )


def label_answers(examples: Sequence[Example]) -> tuple[str, ...]:
    """The different responses of training rows, sorted, where they are labels; else nothing.

    >>> label_answers([Example("?", 0, answer) for answer in ("yes", "no", "No ") * 7])
    ('no', 'yes')
    >>> label_answers([Example("?", 0, answer) for answer in ("yes", "no")])
    ()
    """
    found = {normalise(example.pair or "") for example in examples}
    return tuple(sorted(found)) if ROWS_PER_LABEL * len(found) <= len(examples) else ()


def _folder(path: str | None, subset: str) -> tuple[Path, str]:
    """The data set's folder, and what names the place where it is."""
    place, origin = data_place(path, "flan_feddpa")
    if place is None:
        raise DataError(
            f"the data of task=flan are not on this machine: set task.path to the folder that has {subset}, or "
            "FEDTAILOR_DATA to the folder that has it as flan_feddpa"
        )
    return next((folder for folder in (place / subset, place) if (folder / CLIENTS).is_dir()), place / subset), origin


def _train_files(folder: Path, origin: str) -> Iterator[Path]:
    names = [f"local_training_{number}.json" for number in range(int(CLIENTS))]
    files = [file for name in names if (file := first_file(folder / CLIENTS, (name,)))]
    if not files:
        raise DataError(f"{origin}: {folder / CLIENTS} holds none of {names[0]} ... {names[-1]} (each also with .gz)")
    yield from files


def _by_task(
    files: Iterator[Path] | Sequence[Path], known: Sequence[str], dropped: Counter[str]
) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for file in files:
        for row in read_rows(file):
            task = str(row.values.get("task"))
            if task not in known:
                raise DataError(f"{row.where}: 'task' is {task!r}; allowed: {', '.join(known)}")
            example = read_example(row)
            if is_complete(example, dropped):
                found.setdefault(task, []).append(example)
    return found


ENTRY = TaskEntry(
    load,
    "generation",
    defaults={
        "languages": (ALL,),
        "subset": "dataset1",
        "pools": ("seen",),
        "dealing": "task_specific",
        "clients_per_language": 7,
        "max_length": 512,
    },
)
