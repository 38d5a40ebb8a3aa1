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


def keep(file: Path, content: Mapping[str, Any]) -> None:
    """Writes settings, or makes sure that those in the file are the same.

    Args:
        file: Beside what is made with them.
        content: Plain values.

    Raises:
        InputError: If the file has others.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_beside(file) as part:
            part.write_text(yaml.safe_dump(dict(content), sort_keys=False), encoding="utf-8")
    then = dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {}))
    now = dict(_flat(content))
    differing = sorted(
        key
        for key in now.keys() | then.keys()
        if now.get(key) != then.get(key) and not key.startswith(WRITTEN_TO)
    )
    if differing:
        key = differing[0]
        raise InputError(
            f"--output: {file} has other settings than now ({key}: {then.get(key)}, now "
            f"{now.get(key)}); delete {file.parent}, or choose another --output"
        )


def _flat(content: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value
