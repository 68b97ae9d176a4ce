"""Published search grids, one file per paper: plain data that any search tool can read, and a launcher for Ray Tune."""

from __future__ import annotations

from types import ModuleType
from typing import Final

from tune_spaces import fedp2eft, pf2lora, pfedgpt
from tune_spaces.grid import Grid

PAPERS: Final[tuple[ModuleType, ...]] = (fedp2eft, pf2lora, pfedgpt)
"""Modules with GRIDS (name to grid) and PICKED (key to what the paper chose)."""


def grids() -> dict[str, Grid]:
    """Every published grid by its address, ``<paper>/<grid>``."""
    return {
        f"{paper.__name__.rpartition('.')[2]}/{name}": grid for paper in PAPERS for name, grid in paper.GRIDS.items()
    }
