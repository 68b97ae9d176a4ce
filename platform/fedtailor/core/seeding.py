"""Every random stream is named by coordinates, so no stream depends on who runs it or when."""

from __future__ import annotations

import hashlib

import numpy as np
import torch


def seed_for(*coordinates: int | str) -> int:
    """Derives a 63-bit seed from coordinates such as (run seed, stage, round, client, purpose).

    The method's name is never a coordinate: two methods that should agree draw the same numbers.

    >>> seed_for(42, "base", 3, "seen/amh/00", "order") == seed_for(42, "base", 3, "seen/amh/00", "order")
    True
    >>> seed_for(42, "a") == seed_for(42, "b")
    False
    """
    # Length prefixes keep ("a/b", "c") and ("a", "b/c") apart.
    text = "".join(f"{len(str(c))}:{type(c).__name__}:{c}/" for c in coordinates)
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=8).digest(), "little") >> 1


def numpy_rng(*coordinates: int | str) -> np.random.Generator:
    """A NumPy generator (PCG64) for these coordinates."""
    return np.random.Generator(np.random.PCG64(seed_for(*coordinates)))


def torch_rng(*coordinates: int | str) -> torch.Generator:
    """A CPU torch generator for these coordinates."""
    return torch.Generator().manual_seed(seed_for(*coordinates))
