"""How the C library treats memory that a loader gives back."""

from __future__ import annotations

import ctypes
from functools import cache

# Of glibc's <malloc.h>.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
# The largest that glibc takes.
LARGEST_ON_HEAP_BYTES = 32 << 20
KEPT_BYTES = 1 << 30
ARENAS = 2


@cache
def keep_freed_memory() -> bool:
    """Have freed memory kept for the next allocation, up to 1 GiB of it.

    Windows and batches are blocks of megabytes. glibc returns such a block to the kernel at once and gets it back page
    by page: some 40 page faults per photograph, which cost up to a third of the rate of two decoding threads. A few
    arenas do, since threads allocate seldom.

    Returns:
        Whether the C library was told; others than glibc have no such settings.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_THRESHOLD, LARGEST_ON_HEAP_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_ARENA_MAX, ARENAS))
    return all(tell(name, value) for name, value in settings)
