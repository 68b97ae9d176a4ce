"""What `doctor` finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; ``fail`` makes `doctor` exit with 1."""

    what: str
    level: Level
    text: str
