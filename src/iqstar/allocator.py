"""Tunes glibc's heap for tensors on CPUs: huge pages, little to zero anew, few holes."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt``."""
_GIVEN_BACK = 2**22
"""Blocks of that size come from the kernel and go back to it, where pages are huge."""
_LARGE, _LARGEST_BEFORE_2_35 = 2**30, 2**25
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_ADVISED = "THP_MEM_ALLOC_ENABLE"


def allow_huge_pages() -> None:
    """Lets PyTorch ask Linux for huge pages under tensors of 2 MiB and more.

    It reads the setting once, with its first tensor; once it is imported this does nothing.
    A setting of the user's own is left alone.
    """
    if "torch" not in sys.modules:
        os.environ.setdefault(_ADVISED, "1")


def tune_malloc() -> bool:
    """Makes glibc reuse the memory of freed tensors; has an effect on Linux with glibc only.

    By default it gives large blocks back when they are freed; whoever allocates next waits for the
    kernel to map and zero them, page by page. Kept, they leave holes in the heap. So blocks of
    4 MiB and more are given back where their pages are huge, hence quickly there again, and all
    others are kept until the process ends (docs/decisions/019-freed-memory.md). Settings of the
    user's own, by environment variable, are left alone.

    Returns:
        Whether the settings were taken.
    """
    if any(name in os.environ for name in _OWN_SETTINGS):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # no glibc
        return False
    largest = _GIVEN_BACK if has_huge_pages() else _LARGE
    kept = mallopt(_MMAP_THRESHOLD, largest) or mallopt(_MMAP_THRESHOLD, _LARGEST_BEFORE_2_35)
    return bool(kept and mallopt(_TRIM_THRESHOLD, _LARGE))


def has_huge_pages() -> bool:
    """Whether blocks of 4 MiB lie on huge pages: by PyTorch's advice, or because all do."""
    try:
        mode = (_HUGE_PAGES / "enabled").read_text()
        size = int((_HUGE_PAGES / "hpage_pmd_size").read_text())
    except (OSError, ValueError):  # another system, or a kernel without them
        return False
    advised = "[madvise]" in mode and os.environ.get(_ADVISED) == "1"
    return size <= _GIVEN_BACK and (advised or "[always]" in mode)
