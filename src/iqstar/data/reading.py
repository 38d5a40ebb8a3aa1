"""Rows from local files and the hub, each with its address.

Lines of JSON are read one by one: every row may have columns of its own. All else comes through the
``datasets`` library.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from iqstar.errors import InputError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a data set and where it stands.

    Args:
        values: Column name → value.
        source: The file, or the hub data set's id.
        index: Number of the row in its source, from 0.
        line: Of the source, from 1, where it has lines.
    """

    values: Mapping[str, Any]
    source: str
    index: int
    line: int | None = None

    @property
    def place(self) -> str:
        """``file:line`` for lines of JSON, ``source, row n`` otherwise (both from 1)."""
        if self.line is not None:
            return f"{self.source}:{self.line}"
        return f"{self.source}, row {self.index + 1}"


def find_files(
    path: str | Sequence[str], key: str = "data.path", hub_id: str | None = None
) -> list[Path]:
    """The data files that a setting names; folders are searched recursively, in name order.

    Args:
        path: A file or folder, or several.
        key: Of the setting, for messages.
        hub_id: What is read from the hub where it is left out, if anything.

    Raises:
        InputError: If a path does not exist, has an unknown ending, or is a folder without data.
    """
    known = ", ".join(SUFFIXES)
    files: list[Path] = []
    for entry in [path] if isinstance(path, str) else path:
        if not entry.strip():  # an unset variable; the folder is "."
            raise InputError(f"{key}: is empty; name a file ending in {known}, or a folder")
        try:
            files += _files_of(Path(entry).expanduser(), entry, key, hub_id)
        except PermissionError as error:
            raise InputError(
                f"{key}: {error.filename or entry} cannot be read ({error.strerror}); check its "
                "permissions"
            ) from error
    if not files:
        raise InputError(f"{key}: the list is empty; name a file ending in {known}")
    return files


def _files_of(place: Path, entry: str, key: str, hub_id: str | None) -> list[Path]:
    known = ", ".join(SUFFIXES)
    if place.is_dir():
        found = sorted(p for p in place.rglob("*") if p.is_file() and _is_data(p))
        if not found:
            raise InputError(f"{key}: no data file in the folder {entry}; expected {known}")
        return found
    if not place.exists():
        hub = f", or leave {key} out to read {hub_id} from the hub" if hub_id else ""
        if not (hub or _is_data(place)) and re.fullmatch(r"[\w.-]+/[\w.-]+", entry):
            hub = f" (from the hub: hf download {entry} --repo-type dataset --local-dir FOLDER)"
        raise InputError(f"{key}: no such file or folder: {entry}; give an existing one{hub}")
    if not _is_data(place):
        raise InputError(f"{key}: cannot read {entry}; expected a file ending in {known}")
    return [place]


def read_file(file: Path) -> Iterator[Row]:
    """The rows of one local file, streamed: no copy is left in the library's cache.

    Raises:
        InputError: If the file is empty or malformed; for lines of JSON it names the line.
    """
    lines = file.name.endswith((".jsonl", ".jsonl.gz"))
    row = None
    for row in _read_lines(file) if lines else _read_by_library(file):
        yield row
    if row is None:
        raise InputError(f"{file}{':1' if lines else ''}: the file has no rows; give another")


def _read_lines(file: Path) -> Iterator[Row]:
    number, index = 0, 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as handle:
            for number, line in enumerate(handle, start=1):
                if not line.strip():
                    continue
                values = json.loads(line)
                if b"\\ud" in line.lower():  # half of such a pair of escapes is no text
                    json.dumps(values, ensure_ascii=False).encode()
                if not isinstance(values, dict):
                    raise InputError(f"{file}:{number}: not a JSON object; one object a line")
                yield Row(values=values, source=str(file), index=index, line=number)
                index += 1
    except json.JSONDecodeError as bad:
        if number == 1 and line.strip() in (b"[", b"{"):
            raise InputError(
                f"{file}:1: one JSON value over several lines; write one object a line, or name "
                "the file .json"
            ) from bad
        what = f"{bad.msg}, column {bad.colno}"
        raise InputError(
            f"{file}:{number}: malformed JSON: {what}; repair or remove the line"
        ) from bad
    except UnicodeEncodeError as bad:
        raise InputError(
            f"{file}:{number}: half of a pair of surrogates, as where an emoji was cut in two; "
            "repair or remove the line"
        ) from bad
    except UnicodeDecodeError as bad:
        raise InputError(f"{file}:{number}: not UTF-8 text: {bad}; convert the file") from bad
    except RecursionError as bad:
        raise InputError(
            f"{file}:{number}: malformed JSON: nested too deeply; repair or remove the line"
        ) from bad
    except PermissionError as bad:
        raise InputError(f"{file}: cannot be read ({bad.strerror}); check its permissions") from bad
    except InputError:
        raise
    except ValueError as bad:  # such as a number of thousands of digits
        raise InputError(
            f"{file}:{number}: malformed JSON: {bad}; repair or remove the line"
        ) from bad
    except (OSError, EOFError, zlib.error) as bad:
        raise InputError(f"{file}:{number + 1}: damaged file: {bad}; fetch it again") from bad


def _read_by_library(file: Path) -> Iterator[Row]:
    from datasets import load_dataset  # slow to import

    kind = "parquet" if file.suffix == ".parquet" else "json"
    name = glob.escape(str(file))  # which the library takes for a pattern
    options: dict[str, Any] = {"split": "train", "streaming": True}
    if kind == "json":
        options["parse_agent_traces"] = False  # else it rewrites chat logs
    try:
        # Though nothing is cached, the library wants a folder that it can write to.
        with _quiet(), TemporaryDirectory(prefix="iqstar-") as cache:
            rows = load_dataset(kind, data_files=[name], cache_dir=cache, **options)
            for index, values in enumerate(rows):
                yield Row(values=values, source=str(file), index=index)
    except StopIteration:
        pass  # what the library raises for a file without rows
    # ArrowInvalid is a ValueError
    except (OSError, EOFError, ValueError, TypeError, zlib.error) as error:
        raise InputError(f"{file}: cannot be read: {error}; check the file") from error


def read_hub(name: str, options: Mapping[str, Any]) -> Iterator[Row]:
    """The rows of a data set on the hub, downloaded and cached by ``datasets``.

    Raises:
        InputError: If it cannot be had.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, **options)
    except (OSError, ValueError, DatasetsError) as error:  # no network, data set, folder or split
        subset = options.get("name") or options.get("data_dir")
        check = f"check data.subset ({subset}), or " if subset else ""
        raise InputError(
            f"cannot load {name} from the hub ({type(error).__name__}: {error}); "
            f"{check}set data.path to a local copy of it"
        ) from error
    for index, values in enumerate(rows):
        yield Row(values=values, source=name, index=index)


def _is_data(file: Path) -> bool:
    return file.name.endswith(SUFFIXES) and not file.name.startswith(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the library's own report of a bad file off the terminal: ours names the file."""
    from datasets.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
