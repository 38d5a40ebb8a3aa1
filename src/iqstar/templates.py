"""Chat templates as settings give them."""

from __future__ import annotations

from pathlib import Path

from iqstar.errors import InputError


def is_jinja(given: str) -> bool:
    """Whether this is the text of a template, and not a path or a name."""
    return "{{" in given or "{%" in given


def jinja_text(given: str, key: str, named: str) -> str:
    """The text of a Jinja template, which is given itself or by the path of its file.

    Args:
        given: Text or path.
        key: The YAML key that gave it, for messages.
        named: What it might have been instead, for messages.

    Raises:
        InputError: If it is neither.
    """
    if is_jinja(given):
        return given
    path = Path(given).expanduser()
    if not path.is_file():
        raise InputError(
            f"{key}: {given!r} is neither {named}, nor Jinja text, nor a file; "
            "give the path of a .jinja file"
        )
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{key}: {given} cannot be read ({error}); give a text file in UTF-8"
        ) from error
