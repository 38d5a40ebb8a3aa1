"""Freed memory: large blocks go back to the kernel if it has huge pages, others are kept."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from iqstar import allocator
from iqstar.allocator import allow_huge_pages, tune_malloc

MEASURED = """
import json, resource, sys
from pathlib import Path
from iqstar.allocator import allow_huge_pages, tune_malloc
if "huge" in sys.argv:
    allow_huge_pages()
import torch
if len(sys.argv) > 1:
    assert tune_malloc()
torch.set_num_threads(1)

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

large, small = torch.ones(2**24), torch.ones(2**18)
full = resident()
del large
given_back = full - resident()
del small
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(1, 5):
    torch.ones(2**24 - 1024 * number)
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps({"given_back": given_back, "faults": faults}))
"""
PAGES = 2**26 // 4096
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")


def measured(*modes: str) -> dict[str, int]:
    """Bytes given back of a freed tensor of 64 MiB, and page faults of four others in turn."""
    own = ("MALLOC_", "GLIBC_", "THP_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(own)}
    command = [sys.executable, "-c", MEASURED, *modes]
    done = subprocess.run(command, env=env, capture_output=True, check=True, text=True)
    return json.loads(done.stdout)


@glibc
def test_tensors_reuse_pages_where_they_are_small():
    if HUGE_PAGES.is_file() and "[always]" in HUGE_PAGES.read_text():
        pytest.skip("all pages are huge here")
    assert measured()["faults"] > 2 * PAGES
    kept = measured("tuned")
    assert kept["faults"] < PAGES // 8
    assert kept["given_back"] < 2**20


@glibc
def test_huge_pages_are_given_back_and_are_soon_there_again():
    if not HUGE_PAGES.is_file() or "[never]" in HUGE_PAGES.read_text():
        pytest.skip("the kernel has no huge pages here")
    tuned = measured("tuned", "huge")
    assert tuned["given_back"] > 2**26 - 2**22
    assert tuned["faults"] < PAGES  # of 4 * PAGES; each tensor has small pages at both ends


def kernel(folder: Path, mode: str, size: int = 2**21) -> Path:
    """A folder as Linux shows it of its huge pages."""
    (folder / "enabled").write_text(f"{mode}\n")
    (folder / "hpage_pmd_size").write_text(f"{size}\n")
    return folder


@pytest.mark.parametrize(
    ("mode", "size", "advised", "huge"),
    [
        ("always [madvise] never", 2**21, "1", True),
        ("always [madvise] never", 2**21, "0", False),
        ("[always] madvise never", 2**21, "0", True),
        ("always madvise [never]", 2**21, "1", False),
        ("[always] madvise never", 2**29, "1", False),  # pages of 64 KiB on Arm: 512 MiB
    ],
)
def test_which_kernels_have_huge_pages(tmp_path, monkeypatch, mode, size, advised, huge):
    monkeypatch.setattr(allocator, "_HUGE_PAGES", kernel(tmp_path, mode, size))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", advised)
    assert allocator.has_huge_pages() is huge


def test_other_systems_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(allocator, "_HUGE_PAGES", tmp_path)
    assert not allocator.has_huge_pages()


def test_torch_is_asked_before_it_is_imported_only(monkeypatch):
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    allow_huge_pages()  # the tests have imported it
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ
    monkeypatch.delitem(sys.modules, "torch")
    allow_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "1"
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    allow_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"


def test_settings_of_the_user_win(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not tune_malloc()
