"""Memory of a loader that is used again, instead of fetched from the kernel page by page."""

from __future__ import annotations

import ctypes
import weakref
from collections import defaultdict
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The largest that glibc takes.
LARGEST_ON_HEAP_BYTES = 32 << 20
KEPT_BYTES = 1 << 30
# Of the others, glibc returns an empty heap to the kernel whatever it was told.
ARENAS = 1


@cache
def keep_freed_memory() -> bool:
    """Have freed memory kept for the next allocation, up to 1 GiB of it.

    Windows and decoded images are blocks of up to some megabytes. glibc returns such a block to the kernel and gets it
    back page by page, which can cost a third of the rate of two decoding threads. One arena does, since threads
    allocate such blocks seldom.

    Returns:
        Whether the C library was told; others than glibc have no such settings.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_THRESHOLD, LARGEST_ON_HEAP_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_ARENA_MAX, ARENAS))
    return all(tell(name, value) for name, value in settings)


class ImageMemory:
    """Memory for the images of batches. That of a batch which nobody holds any more is taken for a later one.

    Args:
        image_hw: height and width of the images.
        pin_memory: page-locked, which torch itself keeps for the next time.
    """

    def __init__(self, image_hw: tuple[int, int], *, pin_memory: bool) -> None:
        self._image_hw, self._pin_memory = image_hw, pin_memory
        self._free: defaultdict[int, list[NDArray[np.uint8]]] = defaultdict(list)

    def take(self, size: int) -> Tensor:
        """Memory for ``size`` images: uint8 [size, H, W, 3], of any content."""
        if self._pin_memory:
            return torch.empty((size, *self._image_hw, 3), dtype=torch.uint8, pin_memory=True)
        free = self._free[size]
        memory = free.pop() if free else np.empty((size, *self._image_hw, 3), dtype=np.uint8)
        # The tensor, with all that is made of it, holds this view and nothing else does.
        view = memory.view()
        weakref.finalize(view, free.append, memory).atexit = False
        return torch.from_numpy(view)
