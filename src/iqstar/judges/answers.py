"""Answers of a paid or slow judge, kept in a file of JSON lines."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from iqstar.errors import InputError
from iqstar.judges.base import warn_once


class AnswerCache:
    """Answers by key; each is in the file as soon as it is known.

    A line that an interruption cut is skipped. Several processes may share a file: each appends
    whole lines, and sees what was there when it started.

    Args:
        path: The file; made at the first answer.

    Raises:
        InputError: If it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        if not path.exists():
            return
        try:
            lines = path.read_bytes().splitlines()
        except OSError as error:
            raise InputError(
                f"cache: {path} cannot be read ({error.strerror}); name another file"
            ) from error
        for line in lines:
            try:
                entry = json.loads(line)
                self._known[str(entry["key"])] = str(entry["answer"])
            except (ValueError, KeyError, TypeError):
                continue

    def get(self, key: str) -> str | None:
        """The answer, if it is known."""
        return self._known.get(key)

    def add(self, key: str, answer: str, model: str) -> None:
        """Keeps an answer; a file that cannot be written to is told of once."""
        self._known[key] = answer
        entry = json.dumps({"key": key, "model": model, "answer": answer})
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("ab+") as file:
                    # After an interruption the last line may be a part of one.
                    lead = b""
                    if file.tell():
                        file.seek(-1, 2)
                        lead = b"" if file.read(1) == b"\n" else b"\n"
                    file.write(lead + entry.encode() + b"\n")
        except OSError as error:
            warn_once(
                f"The judge's answers cannot be kept in {self.path} ({error.strerror}); they will "
                "be asked for again"
            )
