"""Workers use freed buffers again: the kernel is not asked for the same pages at every step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy as np
from fedtailor.core.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(2**20)
before = faults()
for _ in range(20):
    np.ones(2**20)  # 8 MiB, touched
    np.ones(2**21)  # 16 MiB
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator can be told: run this on glibc")
def test_a_buffer_of_the_same_size_costs_no_new_pages() -> None:
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    kept = faults("kept")
    assert kept < 10_000, kept  # the first 16 MiB are 4,096 pages
    assert faults("as it is") > 4 * kept
