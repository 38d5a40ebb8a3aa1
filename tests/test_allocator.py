"""Freed memory is kept for the next tensors."""

import os
import platform
import resource
import subprocess
import sys

import pytest

from iqstar.allocator import keep_freed_memory

FAULTS = """
import resource, sys, torch
from iqstar.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(1, 5):
    torch.ones(2**24 - 1024 * number)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    """Pages that the kernel had to bring for tensors of 64 MiB, each a little smaller."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS, mode]
    return int(subprocess.run(command, env=env, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
def test_tensors_reuse_pages():
    pages_of_one = 2**26 // resource.getpagesize()
    assert page_faults("default") > 2 * pages_of_one
    assert page_faults("keep") < pages_of_one // 8


def test_settings_of_the_user_win(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory()
