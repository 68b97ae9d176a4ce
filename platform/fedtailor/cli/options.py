"""Arguments and options that several commands have, and what they open with them.

Heavy imports are inside the functions, so that help and errors come at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedtailor.storage.run_folder import RunFolder

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="Name of a run's folder in the storage.")]

StorageUrl = Annotated[str, typer.Option(help="Where runs are kept; the key 'storage' of the configuration.")]


def _allow(modules: list[str] | None) -> list[str] | None:
    if modules:
        from fedtailor.methods.external import allow

        allow(modules)
    return modules


AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE",
        callback=_allow,
        help="Module from outside that the run may import; repeatable.",
    ),
]


def console(stderr: bool = False) -> Console:
    """See `terminal.terminal`."""
    from fedtailor.cli.terminal import terminal

    return terminal(stderr)


def open_run(run_id: str, storage: str) -> RunFolder:
    """The folder of a run.

    Raises:
        StorageError: there is none of this name.
    """
    from fedtailor.storage.files import Storage
    from fedtailor.storage.run_folder import RunFolder

    return RunFolder.open(Storage(storage), run_id)
