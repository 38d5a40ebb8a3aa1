"""Files and folders that are written whole or not at all: beside their place, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = ".part"
"""How a name ends while what bears it is being written."""


@contextmanager
def written_beside(path: Path, writes: bool = True) -> Iterator[Path]:
    """A name beside ``path`` to write to, which is renamed to ``path`` at the end.

    Args:
        path: The final name, of a file or a folder; if writing fails it is as it was.
        writes: Whether this process cleans up and renames; only one of several does.
    """
    part = path.with_name(path.name + PART)
    if not writes:
        yield part
        return
    try:
        remove(part)
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        publish(part, path)
    finally:
        with suppress(OSError):
            remove(part)


def publish(part: Path, path: Path) -> None:
    """Gives what is complete its final name, in place of what had it before."""
    if path.is_dir() and not path.is_symlink():
        old = path.with_name(path.name + ".old" + PART)
        remove(old)
        path.rename(old)
        try:
            part.rename(path)
        except BaseException:
            old.rename(path)
            raise
        remove(old)
    else:
        os.replace(part, path)
    _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Removes a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Makes a file's content survive a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
