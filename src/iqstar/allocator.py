"""Keeps freed memory of tensors on CPUs, rather than getting it zeroed from the kernel again."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
_LARGE, _LARGEST_BEFORE_2_35 = 2**30, 2**25
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """Makes glibc reuse the memory of freed tensors; has an effect on Linux with glibc only.

    By default it gives large blocks back when they are freed; whoever allocates next waits for the
    kernel to map and zero them, page by page (docs/decisions/019-freed-memory.md). What a process
    needs at its peak hardly changes; it is given back when the process ends. Settings of
    the user's own, by environment variable, are left alone.

    Returns:
        Whether the settings were taken.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    kept = mallopt(_MMAP_THRESHOLD, _LARGE) or mallopt(_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _LARGE))
