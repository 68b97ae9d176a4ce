"""One part of `make bench-gpu`: ``gpu_part.py NAME MODULE:FUNCTION RESULTS DEVICE SIZE SECONDS [OPTION ...]``.

What it raises ends this process; who started it notes the traceback.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from gpu_run import append


@dataclass
class Bench:
    """What a part is told, and where it puts what it finds.

    Args:
        part: its name.
        results: the file of JSON lines.
        device: ``cpu`` or ``cuda``.
        quick: shapes so small that the figures mean nothing.
        until: when it is killed, by `time.monotonic`.
    """

    part: str
    results: Path
    device: str
    quick: bool
    until: float

    def __post_init__(self) -> None:
        self._failed: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self.until - time.monotonic()

    def row(self, table: str, cells: Mapping[str, Any]) -> None:
        """Writes a row of a table, at once; its columns are the keys."""
        append(self.results, {"part": self.part, "table": table, "cells": dict(cells)})

    def answer(self, text: str) -> None:
        """Writes a sentence for the top of the page."""
        append(self.results, {"part": self.part, "answer": text})

    @contextmanager
    def attempt(self, table: str, cells: Mapping[str, Any], column: str) -> Iterator[None]:
        """What is inside may fail without ending the part: then the error is the row's ``column``.

        Running out of a card's memory is an answer; every other error makes the part fail in the end, see `close`.
        """
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            self.row(table, {**cells, column: f"out of memory: {_first(error)}"})
        except Exception as error:
            import traceback

            traceback.print_exc()
            self.row(table, {**cells, column: f"{type(error).__name__}: {_first(error)}"})
            self._failed.append(f"{', '.join(str(value) for value in cells.values())}: {type(error).__name__}")

    def fail(self, text: str) -> None:
        """Notes that something is not as it must be; the part goes on and fails in the end."""
        print(text, flush=True)
        self._failed.append(text)

    def close(self) -> None:
        """Raises what went wrong on the way."""
        if self._failed:
            raise SystemExit(f"{len(self._failed)} failed: {'; '.join(self._failed)}")


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def main() -> None:
    name, target, results, device, size, seconds, *options = sys.argv[1:]
    bench = Bench(name, Path(results), device, size == "quick", time.monotonic() + float(seconds))
    module, _, function = target.partition(":")
    getattr(import_module(module), function)(bench, *options)
    bench.close()


if __name__ == "__main__":
    main()
