"""What `plan` shows of a user's own data: columns, clients, labels, repeated texts, and rows that were left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

from rich.console import Console
from rich.markup import escape

from fedtailor.cli.terminal import plain_table
from fedtailor.core.errors import listed
from fedtailor.tasks.source import POOLS, look_alikes
from fedtailor.tasks.tables import data_files, is_saved

MOST_LABELS: Final = 20
"""Rows of the table of labels."""

_DROPPED: Final = {
    "dropped_empty_texts": "without a text",
    "dropped_empty_responses": "without a response",
    "dropped_empty_instructions": "without an instruction",
    "dropped_validation_rows": "of validation, as there are rows of test",
}
"""Note of a manifest to what was wrong with the rows that it counts."""


def show_data(console: Console, path: str, manifest: Mapping[str, Any]) -> None:
    """Prints what was found in a table of the user's own.

    Args:
        console: where to show.
        path: ``task.path``.
        manifest: of the prepared data, see `tasks.task.prepare`.
    """
    used = manifest["columns"]
    columns = ", ".join(
        f"{what} '{used[what]}'" for what in ("text", "pair", "label", "client", "group") if what in used
    )
    notes, clients = manifest["notes"], manifest["clients"]
    console.print(f"[bold]{'data':<8}[/] {notes['rows_read']:,} rows; {escape(columns)}", soft_wrap=True)
    if "client" not in used:
        alpha = manifest["config"]["alpha"]
        console.print(f"{'':<8} no column names a client: dealt with Dirichlet label skew, task.alpha = {alpha:g}")
    if files := _files(Path(path).expanduser()):
        console.print(f"{'':<8} files: {escape(files)}", soft_wrap=True)
    console.print(f"{'':<8} split: {escape(str(notes['split']))}")
    numbers = ("clients", "train", "test", "smallest\nclient", "median\nclient", "largest\nclient")
    table = plain_table("pool", *numbers, title="Rows", numbers=numbers)
    for pool in POOLS:
        some = [client for client in clients if client["id"].startswith(f"{pool}/")]
        if some:
            sizes = [client["n_train"] + client["n_test"] for client in some]
            train, test = (sum(client[name] for client in some) for name in ("n_train", "n_test"))
            counts = (len(some), train, test, min(sizes), round(median(sizes)), max(sizes))
            table.add_row(pool, *(f"{count:,}" for count in counts))
    console.print(table)
    if len(manifest["labels"]) > 1:
        _show_labels(console, manifest)
    for sentence in _findings(manifest):
        console.print(f"[yellow]•[/] {escape(sentence)}")


def _files(folder: Path) -> str:
    """Which files of a folder are for what; empty for a single file and what the hub or ``datasets`` keeps."""
    if not folder.is_dir() or is_saved(folder):
        return ""
    by_part: dict[str | None, list[str]] = {}
    for path, part in data_files(folder):
        by_part.setdefault(part, []).append(str(path.relative_to(folder)))
    if None in by_part:
        return f"{listed(by_part[None])}; no name says a split"
    return "; ".join(f"{listed(names)} ({part})" for part, names in by_part.items())


def _show_labels(console: Console, manifest: Mapping[str, Any]) -> None:
    what = "group" if manifest.get("kind") == "generation" else "label"
    table = plain_table(what, "train", "test", title=f"{what.capitalize()}s", numbers=("train", "test"))
    labels, counts = manifest["labels"], _class_counts(manifest)
    for label, train, test in list(zip(labels, *counts, strict=True))[:MOST_LABELS]:
        table.add_row(escape(label), f"{train:,}", f"{test:,}")
    if (more := len(labels) - MOST_LABELS) > 0:
        table.add_row(f"[dim]and {more} more[/]", *(f"{sum(count[MOST_LABELS:]):,}" for count in counts))
    console.print(table)


def _class_counts(manifest: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Train and test rows of each label, over all clients."""
    train, test = (
        [sum(column) for column in zip(*(client[name] for client in manifest["clients"]), strict=True)]
        for name in ("train_classes", "test_classes")
    )
    return train, test


def _findings(manifest: Mapping[str, Any]) -> Iterator[str]:
    """What is allowed but worth knowing."""
    notes, config = manifest["notes"], manifest["config"]
    texts = "examples" if manifest.get("kind") == "generation" else "texts"
    for name, why in _DROPPED.items():
        if count := notes.get(name):
            yield f"{count:,} rows left out: {why}."
    dropped = sum(notes.get(name, 0) for name in _DROPPED)
    if unused := notes["rows_read"] - dropped - manifest["rows"]:
        keys = {"max_examples": None, "drop_duplicates": False, "clients_kept": None}
        set_to = [f"task.{key}={config[key]}" for key, neutral in keys.items() if config[key] != neutral]
        yield f"{unused:,} rows take no part ({', '.join(set_to).lower()})."
    if unused := notes["unused_test_texts"]:
        yield f"{unused:,} test texts have a label that no train text of their pool has, and belong to no client."
    if same := notes["leak_seen_train_test"] + notes["leak_unseen_train_test"]:
        way = "" if config["drop_duplicates"] else "; task.drop_duplicates=true takes them out of test"
        yield f"{same:,} {texts} are in train and in test{way}."
    if same := notes["leak_seen_unseen"]:
        yield f"{same:,} {texts} are with seen and with unseen clients."
    names = [client["id"].rpartition("/")[2] for client in manifest["clients"]]
    for what, known in (("clients", names if "client" in manifest["columns"] else []), ("labels", manifest["labels"])):
        if alike := look_alikes(known):
            yield f"These {what} differ only in case, blanks or Unicode form: {listed(alike, separator='; ')}."
    if manifest.get("kind") != "generation":
        train, test = _class_counts(manifest)
        if untrained := [name for name, n, m in zip(manifest["labels"], train, test, strict=True) if m and not n]:
            yield f"Labels that only test rows have: {listed(untrained)}."
