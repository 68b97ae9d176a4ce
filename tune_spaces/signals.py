"""Ctrl-C and SIGTERM while Tune searches: it writes its state and ends; a second signal ends at once."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from fedtailor.core.errors import Interrupted

_OURS = (signal.SIGINT, signal.SIGTERM)
_TUNES = signal.SIGUSR1
"""What Tune takes for the wish to end in order, however it is configured."""


@dataclass
class TuneSignals:
    """``with TuneSignals(tell) as signals: tuner.fit(); signals.number``.

    Tune's own handler knows SIGINT only and hides which signal came, so it is turned off.

    Args:
        tell: shows a sentence when the first signal comes.
        number: the first signal that came.
    """

    tell: Callable[[str], None]
    number: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> TuneSignals:
        """Takes over the signals."""
        os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
        self._before = {number: signal.getsignal(number) for number in (*_OURS, _TUNES)}
        for number in _OURS:
            signal.signal(number, self._received)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Ends with the signal's exit code if one came.

        Raises:
            Interrupted: 130 for Ctrl-C, 143 for SIGTERM.
        """
        if self.number is not None:
            raise self._ended("stopped: what is committed is kept")

    def _received(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if first and signal.getsignal(_TUNES) != self._before[_TUNES]:
            self.tell("stopping: the trials end at their last commit; once more (Ctrl-C) stops at once")
            signal.raise_signal(_TUNES)
            return
        raise self._ended("stopped at once: what is committed is kept")

    def _ended(self, text: str) -> Interrupted:
        error = Interrupted(text)
        error.exit_code = 128 + (self.number or signal.SIGINT)
        return error
