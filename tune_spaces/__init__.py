"""Published search grids, one file per paper: plain data that any search tool can read."""

from __future__ import annotations

from tune_spaces import fedp2eft

PAPERS = (fedp2eft,)
"""Modules with GRIDS (method to grid) and PICKED (key to what the paper chose)."""
