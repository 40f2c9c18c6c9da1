"""Freed blocks are used again instead of being fetched from the kernel page by page."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from vitscale.data.allocation import ImageMemory

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


def test_memory_of_dropped_batches_is_used_again() -> None:
    memory = ImageMemory((4, 6), pin_memory=False)
    first = memory.take(3)
    assert (first.shape, first.dtype) == ((3, 4, 6, 3), torch.uint8)
    place = first.data_ptr()
    assert memory.take(2).data_ptr() != place
    del first
    again = memory.take(3)
    assert again.data_ptr() == place


def test_memory_that_anything_holds_is_not_used_again() -> None:
    memory = ImageMemory((4, 6), pin_memory=False)
    holders = [
        memory.take(3),
        memory.take(3).permute(0, 3, 1, 2)[1],
        memory.take(3).numpy()[1:, 2],
        torch.utils.data.default_collate([memory.take(3)])[0],
        memory.take(3).untyped_storage(),
    ]
    for number, holder in enumerate(holders):
        holder.fill(number) if isinstance(holder, np.ndarray) else holder.fill_(number)
    for _ in range(10):
        memory.take(3).fill_(99)
    for number, holder in enumerate(holders):
        assert all(value == number for value in np.asarray(list(holder)).flat)
