"""Keeps freed memory in the process: a training step asks for the same buffers as the one before it."""

from __future__ import annotations

import ctypes

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8
"""Numbers of glibc's mallopt(3)."""

LARGEST_KEPT = 32 * 2**20
"""Bytes; glibc takes no larger threshold. Weights of large models stay above it and go back to the system."""
KEPT = 512 * 2**20
"""Free bytes at the end of the heap from which on they are given back."""


def keep_freed_memory() -> bool:
    """Tells glibc to use freed buffers again instead of giving them back to the system after every step.

    By default large buffers and the end of the heap go back when they are freed, so every step asks for the same pages
    again, which the kernel zeroes first: up to 600,000 a round. Changes no number.

    Returns:
        Whether this C library can be told so; others (musl, macOS) are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # One arena: those of further threads give back whole heaps of 64 MB, whatever the thresholds say.
    settings = ((_ARENA_MAX, 1), (_MMAP_THRESHOLD, LARGEST_KEPT), (_TRIM_THRESHOLD, KEPT))
    taken = [bool(mallopt(key, value)) for key, value in settings]
    return all(taken)
