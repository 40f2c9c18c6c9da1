"""Freed blocks are used again instead of being fetched from the kernel page by page."""

from __future__ import annotations

import subprocess
import sys

import pytest

_PROGRAM = """
import platform, resource, sys
from vitscale.data.allocation import keep_freed_memory

told = sys.argv[1] == "told" and keep_freed_memory()
for round in range(60):
    if round == 10:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [bytes(9 << 20) for _ in range(4)]
    del blocks
print(told, platform.libc_ver()[0], resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True)
    told, library, count = done.stdout.split()
    if library != "glibc":
        pytest.skip("only glibc has these settings")
    assert told == str(mode == "told")
    return int(count)


def test_blocks_are_used_again() -> None:
    # 50 rounds of 4 blocks of 9 MiB have 460,000 pages of 4 KiB.
    assert faults("told") < 10_000
