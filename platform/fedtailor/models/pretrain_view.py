"""What a pretraining shows: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

LINE_EVERY_S = 30.0


class PretrainView:
    """Receives the events of `pretrain`; ``with PretrainView(console) as show: ...``.

    Args:
        console: where to show.
        clock: seconds, for the speeds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._progress = Progress(
            BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"), console=console, auto_refresh=False
        )
        self._task = self._progress.add_task("", total=1, told="", visible=False)
        self._loss: float | None = None
        self._began = self._said = 0.0
        self._first = self._steps = self._tokens = 0

    def __enter__(self) -> PretrainView:
        """Takes the terminal's last line."""
        if self._console.is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves the terminal as it was."""
        if self._console.is_terminal:
            self._progress.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Shows one event."""
        if event["kind"] == "note":
            self._console.print(escape(event["text"]), highlight=False)
        elif event["kind"] == "start":
            self._first, self._steps, self._tokens = event["step"], event["steps"], event["tokens"]
            self._began = self._said = self._clock()
            self._progress.update(self._task, total=event["steps"], completed=event["step"], visible=True)
        elif event["kind"] == "step":
            self._step(event["step"], event["loss"])
        elif event["kind"] == "measure":
            self._console.print(
                f"step {event['step']}: train loss {event['train_loss']:.3f}, held-out loss "
                f"{event['held_out_loss']:.3f}, accuracy {event['held_out_accuracy']:.1%} of masked tokens",
                highlight=False,
            )

    def _step(self, step: int, loss: float) -> None:
        self._loss = loss if self._loss is None else 0.98 * self._loss + 0.02 * loss
        now = self._clock()
        rate = (step - self._first) / max(now - self._began, 1e-9)
        left = timedelta(seconds=round((self._steps - step) / rate))
        told = f"loss {self._loss:.3f}  {rate:.2f} steps/s  {rate * self._tokens:,.0f} tokens/s  ETA {left}"
        if self._console.is_terminal:
            self._progress.update(self._task, completed=step, told=told)
            self._progress.refresh()
        elif now - self._said >= LINE_EVERY_S:
            self._said = now
            self._console.print(f"step {step}/{self._steps}  {told}", highlight=False)
