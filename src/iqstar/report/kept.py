"""Responses that are kept on disk before anything is scored, and used again by the same command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iqstar.atomic import written_beside
from iqstar.errors import InputError
from iqstar.mdp import Prompt
from iqstar.paired_responses import Pair, read_pairs, write_pairs
from iqstar.templates import is_jinja

RESPONSES = "responses.jsonl"
SETTINGS = "responses.settings.json"
"""What the responses depend on, and the SHA-256 of their file."""


def keep_pairs(folder: Path, pairs: Sequence[Pair], settings: Mapping[str, Any]) -> None:
    """Writes responses, then what they depend on: the latter is there when the former is whole.

    Args:
        folder: Where to.
        pairs: The responses.
        settings: JSON values by key or option.
    """
    file = folder / RESPONSES
    (folder / SETTINGS).unlink(missing_ok=True)
    write_pairs(file, pairs)
    content = {"sha256": _sha256(file), "settings": dict(settings)}
    with written_beside(folder / SETTINGS) as part:
        part.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def kept_pairs(folder: Path, settings: Mapping[str, Any]) -> list[Pair] | None:
    """The responses of an earlier command with the same settings.

    Args:
        folder: Where it wrote to.
        settings: Those of now.

    Returns:
        The responses; None where none were completed there.

    Raises:
        InputError: If those there were made with other settings, or were changed since.
    """
    file, remedy = folder / RESPONSES, "choose another --output, or add --overwrite"
    try:
        kept = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        then, known = kept["settings"], kept["sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"--output: {folder / SETTINGS} is damaged; {remedy}") from error
    now = json.loads(json.dumps(settings))
    if differing := sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k)):
        raise InputError(
            f"--output: the responses in {folder} were sampled with other settings "
            f"({', '.join(differing)}); {remedy}"
        )
    if not file.is_file() or _sha256(file) != known:
        raise InputError(f"--output: {file} is not as it was written; {remedy}")
    return read_pairs(file)


def stamp(source: str | None) -> list[int] | None:
    """Size in bytes and last change of a file, or of the files of a folder; None without either.

    What lies deeper does not count: such as a report on the model that the folder holds.
    """
    if source is None or is_jinja(source) or not (path := Path(source).expanduser()).exists():
        return None
    found = [f.stat() for f in ([path] if path.is_file() else path.iterdir()) if f.is_file()]
    return [sum(s.st_size for s in found), max((s.st_mtime_ns for s in found), default=0)]


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """Identity of prompts in their order."""
    turns = [[(m.role, m.content) for m in prompt.messages] for prompt in prompts]
    return hashlib.sha256(json.dumps(turns).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
