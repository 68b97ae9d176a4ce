"""Task ``squad``: a question to a paragraph of Wikipedia, answered by a span of it (Rajpurkar et al., 2016 and 2018).

As PF2LoRA has it (section 6.1.2): the train part of SQuAD v1.1, or of v2.0, whose third of unanswerable questions has
no span; 80 % of the questions to train on and 20 % to be tested by, dealt to 4 clients by `tasks.sorted_share` with the
articles, sorted by title, in the place of classes. The group of all results is the data set, ``squad1`` or ``squad2``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from fedtailor.core.errors import ConfigError, DataError, listed
from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.places import data_place, first_file
from fedtailor.tasks.rows import Row, hub_rows, parse_json, read_text
from fedtailor.tasks.source import Example, Source, Split, TaskEntry, one_group

HUB_IDS: Final[Mapping[str, str]] = {"v1": "rajpurkar/squad", "v2": "rajpurkar/squad_v2"}
FILES: Final[Mapping[str, tuple[str, ...]]] = {
    "v1": ("train-v1.1.json", "train-v2.0.json"),
    "v2": ("train-v2.0.json",),
}
"""Names of a version's train part in a folder, best first; of v2 the answerable questions serve v1."""

LANGUAGE: Final = "eng"


def load(cfg: TaskConfig, seed: int) -> Source:
    """Questions from ``task.path``, else $FEDTAILOR_DATA/squad, else the hub.

    The place is a JSON file as SQuAD distributes them, or a folder with a version's train part or with one such file;
    each also with ``.gz``. Of v1 only questions with an answer are kept, also where the file has others.

    Args:
        cfg: `subset`, `path`, `test_fraction` and `drop_duplicates` are used.
        seed: run seed.

    Raises:
        ConfigError: no version is named, or languages other than English.
        DataError: no file, a damaged one, one without a usable question, or the hub cannot be reached.
    """
    if cfg.subset is None or cfg.subset not in HUB_IDS:
        raise ConfigError(f"'task.subset' names no version of squad (allowed: {', '.join(HUB_IDS)})")
    if cfg.languages != (LANGUAGE,):
        raise ConfigError(f"'task.languages' ({', '.join(cfg.languages)}): squad is in English alone ({LANGUAGE})")
    notes: dict[str, int | str] = {"dropped_empty": 0, "dropped_without_answer": 0}
    found: list[tuple[str, Example]] = []
    absent: list[str] = []
    for row in _rows(cfg):
        title, question, context = (str(row.values.get(key) or "") for key in ("title", "question", "context"))
        if not question.strip() or not context.strip():
            notes["dropped_empty"] = int(notes["dropped_empty"]) + 1
            continue
        given = row.values["answers"]
        if not given and cfg.subset == "v1":
            notes["dropped_without_answer"] = int(notes["dropped_without_answer"]) + 1
            continue
        answers = [span for text, start in given if (span := _span(context, text, start))]
        if given and not answers:
            absent.append(row.where)
            continue
        found.append((title, Example(question, 0, context, answers=json.dumps(answers, ensure_ascii=False))))
    if absent:
        notes["dropped_not_in_context"] = f"{len(absent)}, {listed(absent)}"
    if not found:
        raise DataError(f"squad {cfg.subset}: no question with {'an answer' if cfg.subset == 'v1' else 'a context'}")
    titles = sorted({title for title, _ in found})
    number = {title: i for i, title in enumerate(titles)}
    examples = [example._replace(label=number[title]) for title, example in found]
    group, order = f"squad{cfg.subset[1:]}", numpy_rng(seed, "squad", cfg.subset).permutation(len(examples))
    tests = round(cfg.test_fraction * len(examples))
    parts: dict[Split, list[Example]] = {
        "train": [examples[i] for i in order[tests:]],
        "test": [examples[i] for i in order[:tests]],
    }
    pools, counts = one_group(group, parts, seed, cfg.drop_duplicates, "squad", cfg.subset)
    return Source(labels=tuple(titles), pools=pools, notes=notes | counts, kind="extraction")


def dropped_sentence(notes: Mapping[str, Any]) -> str:
    """What a plan and a caption say of questions that were left out; empty where none were.

    >>> dropped_sentence({"dropped_not_in_context": "2, train.json, question 5a and train.json, question 7b"})
    'Left out, as their answers are not in their contexts: 2, train.json, question 5a and train.json, question 7b.'
    """
    dropped = notes.get("dropped_not_in_context")
    return f"Left out, as their answers are not in their contexts: {dropped}." if dropped else ""


def _span(context: str, text: str, start: int) -> dict[str, Any] | None:
    """An answer where it is said to be, or where its context has it nearest to there; None: it has not."""
    places = [i for i in range(len(context)) if context.startswith(text, i)] if text.strip() else []
    if context[start : start + len(text)] == text and places:
        return {"text": text, "start": start}
    return {"text": text, "start": min(places, key=lambda i: abs(i - start))} if places else None


def _rows(cfg: TaskConfig) -> Iterator[Row]:
    """``title``, ``question``, ``context`` and ``answers``, pairs of text and first character."""
    assert cfg.subset is not None
    place, origin = data_place(cfg.path, "squad")
    if place is None:
        for row in hub_rows(HUB_IDS[cfg.subset], split="train"):
            answers = row.values["answers"]
            yield Row(
                row.where, {**row.values, "answers": [*zip(answers["text"], answers["answer_start"], strict=True)]}
            )
        return
    path = place if place.is_file() else _file(place, origin, FILES[cfg.subset])
    yield from _file_rows(path)


def _file(folder: Path, origin: str, names: Sequence[str]) -> Path:
    """The file of a folder that has the data.

    Raises:
        DataError: none has, or several may have.
    """
    if found := first_file(folder, names):
        return found
    others = sorted(p for p in folder.glob("*") if p.name.endswith((".json", ".json.gz"))) if folder.is_dir() else []
    if len(others) == 1:
        return others[0]
    wanted = " or ".join(f"{name}[.gz]" for name in names)
    there = f"several JSON files ({', '.join(p.name for p in others)}): give one" if others else "no JSON file"
    raise DataError(f"{origin}: {folder} holds no {wanted}, and {there}; without a place it is loaded from the hub")


def _file_rows(path: Path) -> Iterator[Row]:
    """Questions of a file, each by its id.

    Raises:
        DataError: it is not as SQuAD has it; says where.
    """
    whole = parse_json(read_text(path), str(path))
    for article in _list(whole, "data", str(path)):
        title = str(article.get("title", "")) if isinstance(article, dict) else ""
        for paragraph in _list(article, "paragraphs", f"{path}, article {title!r}"):
            for entry in _list(paragraph, "qas", f"{path}, article {title!r}"):
                where = f"{path}, question {entry.get('id', '?')}" if isinstance(entry, dict) else str(path)
                answers = _list(entry, "answers", where)
                try:
                    spans = [(str(answer["text"]), int(answer["answer_start"])) for answer in answers]
                    values = {"question": str(entry["question"]), "context": str(paragraph["context"])}
                except (KeyError, TypeError, ValueError) as error:
                    raise DataError(
                        f"{where}: needs 'question', 'context' and answers with 'text' and 'answer_start' ({error!r})"
                    ) from error
                yield Row(where, {"title": title, **values, "answers": spans})


def _list(value: Any, key: str, where: str) -> list[Any]:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{where}: no list '{key}', so this is no file of SQuAD (or it was cut)")
    return found


def place_of(cfg: TaskConfig, example: Example) -> str:
    """File and id of the first question like this one."""
    same = (
        row for row in _rows(cfg) if (row.values["question"], row.values["context"]) == (example.text, example.pair)
    )
    return next((row.where for row in same), "")


ENTRY = TaskEntry(
    load,
    "extraction",
    defaults={
        "languages": (LANGUAGE,),
        "subset": "v1",
        "pools": ("seen",),
        "sorted_share": 0.5,
        "clients_per_language": 4,
        "max_length": 384,
        "test_fraction": 0.2,
    },
    place_of=place_of,
)
