"""glibc keeps what is freed: what was given once is there without a page fault."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROBE = """
import resource, sys
if sys.argv[1] == "settled":
    from rlhf_core.memory import settle_memory
    settle_memory()
import numpy as np
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
np.ones(1 << 23)
before = faults()
for _ in range(20):
    np.ones(1 << 23)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_blocks_of_64_mb_are_taken_again_without_page_faults() -> None:
    found = {
        how: int(subprocess.run([sys.executable, "-c", PROBE, how], capture_output=True, text=True, check=True).stdout)
        for how in ("settled", "as it is")
    }
    assert found["as it is"] > 10 * max(found["settled"], 1), "huge pages make them few, not none"
