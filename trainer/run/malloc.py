"""What the host's allocator does with freed memory, on runs that compute on CPUs."""

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h of glibc
LARGEST = 2**31 - 1
"""What mallopt, which takes an int, can be told at most, in bytes."""
OLD_LIMIT = 32 * 2**20
"""What glibc before 2.35 lets buffers be at most that do not come from the kernel one by one."""


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory for the next step, which frees and takes the same again; whether it was told.

    By default it gives large buffers back to the kernel, and each step pays for the pages' faults anew. A process then
    holds its largest need so far. The user's own MALLOC_* or GLIBC_TUNABLES stand; another C library is left alone.
    """
    if platform.libc_ver()[0] != "glibc" or "GLIBC_TUNABLES" in os.environ:
        return False
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    kept = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, OLD_LIMIT)
    # told alone, this would freeze the other one where it happens to stand
    return bool(kept and mallopt(M_TRIM_THRESHOLD, LARGEST))
