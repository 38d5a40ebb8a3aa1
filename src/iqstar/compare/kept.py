"""What runs and pairs were made with stands beside them: others are not taken for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from iqstar.atomic import written_beside
from iqstar.errors import InputError

SETTINGS = "run.yaml"
"""Of a run, in its folder."""
WRITTEN_TO = ("trainer.logger", "output")
"""Keys that say where a run is written to; its folder may be moved."""
_ABSENT = object()


def keep(file: Path, content: Mapping[str, Any]) -> None:
    """Writes settings beside what is made with them.

    Args:
        file: Where to; replaced if it exists.
        content: Plain values.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with written_beside(file) as part:
        part.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")


def check_same(
    file: Path, content: Mapping[str, Any], made: str, places: tuple[str, ...] = WRITTEN_TO
) -> None:
    """Makes sure that settings are those that were kept, if any were.

    Args:
        file: As :func:`keep` wrote it; nothing is checked where it does not exist.
        content: Plain values.
        made: What was made with the old ones and has to go, for the message.
        places: Keys of files and folders, which may have been moved.

    Raises:
        InputError: If the file has others.
    """
    if not file.exists():
        return
    then = dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {}))
    now = dict(_flat(content))
    for key in sorted(now.keys() | then.keys()):
        old, new = then.get(key, _ABSENT), now.get(key, _ABSENT)
        if old != new and not key.startswith(places):
            raise InputError(
                f"--output: {file} has other settings than now ({key}: {_told(old)}, now "
                f"{_told(new)}); delete {made}, or choose another --output"
            )


def _told(value: Any) -> str:
    return "not given" if value is _ABSENT else "null" if value is None else str(value)


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
