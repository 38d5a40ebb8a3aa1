"""The prompts that ship with the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from iqstar.data.jsonl import JSONL
from iqstar.data.reading import Row, read_file
from iqstar.errors import InputError

_FOLDER = Path(__file__).parent


class Sample(JSONL):
    """About 200 everyday and delicate prompts, shipped with the package: a start without data.

    They come with a held-out set of their own, of which val_prompts are used.
    """

    def rows(self) -> Iterator[Row]:
        """The prompts to train on."""
        if self.path is not None:
            raise InputError("data.path: Sample reads its own files; use JSONL to read a path")
        yield from read_file(_FOLDER / "train.jsonl")

    def heldout_rows(self) -> Iterator[Row]:
        """The held-out prompts."""
        return read_file(_FOLDER / "heldout.jsonl")
