"""An orderly end: Ctrl-C and SIGTERM become a wish to stop at the next segment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from fedtailor.core.errors import Interrupted

GRACE_S = 20.0
"""Seconds between the wish to stop and the moment when the segment under way is given up."""

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


@dataclass
class StopSignals:
    """Asks whether somebody wants the run to stop: ``with StopSignals(tell) as stop: ... stop()``.

    After ``grace_s`` the segment under way is given up, as it is at a second signal; commits stay valid.

    Args:
        tell: shows a sentence when the first signal comes.
        grace_s: seconds.
        graceful: False until there is a run to stop; before that the first signal ends at once.
        number: the first signal that came.
    """

    tell: Callable[[str], None]
    grace_s: float = GRACE_S
    graceful: bool = False
    number: int | None = None
    _before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopSignals:
        """Takes over the signals."""
        for number in WATCHED:
            self._before[number] = signal.getsignal(number)
        self._take_over()
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __call__(self) -> bool:
        """Whether to stop."""
        self._take_over()
        return self.number is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.number or signal.SIGINT)

    def _take_over(self) -> None:
        """Installs the handlers; again, since starting Ray in this process puts its own in their place."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number in WATCHED:
            if signal.getsignal(number) != self._received:
                signal.signal(number, self._received)

    def _received(self, number: int, _: FrameType | None) -> None:
        first, self.number = self.number is None, self.number or number
        if first and self.graceful:
            signal.setitimer(signal.ITIMER_REAL, self.grace_s)
            self.tell("stopping at the next segment; once more (Ctrl-C) stops at once")
            return
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interrupted("stopped at once: what is committed is kept")
