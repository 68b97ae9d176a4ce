"""``fedtailor compare``: opens the runs, compares them and writes a folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fedtailor.core.errors import StorageError
from fedtailor.core.files import staged_folder
from fedtailor.experiment.stages import short_hash
from fedtailor.report.compare_content import Comparison, work_out
from fedtailor.report.compare_figure import draw
from fedtailor.report.compare_online import on_wandb
from fedtailor.report.compare_pairs import pairs_csv
from fedtailor.report.compare_read import open_sides
from fedtailor.report.compare_tables import results_csv
from fedtailor.report.compare_text import markdown
from fedtailor.report.style import save, styled
from fedtailor.storage.files import Storage

TEXT = "compare.md"


def compare_runs(storage: Storage, names: Sequence[str], out: Path | None = None) -> tuple[Comparison, Path]:
    """Compares runs and writes ``compare.md``, ``.csv``, ``.png``, ``.svg`` and ``compare_pairs.csv``.

    Args:
        storage: where the runs are.
        names: run ids, two or more; a difference is a later one minus an earlier one.
        out: new folder; default: ``compare-<hash of the run ids>`` in the storage, which replaces an earlier one.

    Returns:
        What was found, and the folder.

    Raises:
        ConfigError, StorageError: see `open_sides`; also if ``out`` is not empty, or the storage is not local and
            ``out`` is not given.
    """
    folder = _folder(storage, names, out)
    content = work_out(open_sides(storage, names))
    content = replace(content, wandb=on_wandb(content.sides, markdown(content)))
    with staged_folder(folder) as stage:
        write(content, stage)
    return content, folder


def write(content: Comparison, folder: Path) -> None:
    """Writes all files; equal runs give equal bytes."""
    with styled(content.run_ids):
        save(draw(content.run_ids, content.tables, content.measure), folder)
    for name, table in (
        ("compare.csv", results_csv(content.sides)),
        ("compare_pairs.csv", pairs_csv(content.sides, content.pairs)),
    ):
        table.to_csv(folder / name, index=False, lineterminator="\n")
    (folder / TEXT).write_text(markdown(content), encoding="utf-8", newline="\n")


def _folder(storage: Storage, names: Sequence[str], out: Path | None) -> Path:
    if out is None:
        if not storage.is_local:
            raise StorageError(f"{storage.url} is not a local folder; give --out a new folder for the comparison")
        own = storage.local_path(f"compare-{short_hash(list(names))[:8]}")
        if not own.exists() or (own / TEXT).is_file():
            return own
        raise StorageError(f"{own} is there and is no comparison; give --out a new folder")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise StorageError(f"--out {out} is there already and not an empty folder")
    return out
