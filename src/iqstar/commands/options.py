"""Options of the commands that read no run's settings: unknown or wrong ones get one clear line."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from iqstar.errors import InputError


class OptionParser(ArgumentParser):
    """An argument parser whose errors are an InputError.

    Args:
        command: The sub-command.
        description: For its help.
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"iqstar {command}", allow_abbrev=False, description=description)

    def error(self, message: str) -> NoReturn:
        """Raises what is wrong.

        Raises:
            InputError: Always.
        """
        message = re.sub(r"^argument ([^:]+): ", r"\1: ", message)
        raise InputError(f"{message}; see {self.prog} --help")

    def options(self, argv: Sequence[str]) -> Namespace:
        """The options that the arguments give.

        Raises:
            InputError: If one is missing, wrong or unknown.
        """
        options, unknown = self.parse_known_args(argv)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"see {self.prog} --help"
            raise InputError(f"{unknown[0]}: unknown option; {hint}")
        return options


def path(text: str) -> Path:
    """A path as an option gives it; ``~`` is the user's home."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArgumentTypeError(f"{text} begins with ~ and the name of no user") from error


@contextmanager
def writable(flag: str, place: Path, choose: str = "another") -> Iterator[None]:
    """A failure to write names the option.

    Args:
        flag: The option.
        place: What it names.
        choose: What to give it instead.

    Raises:
        InputError: If something cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{flag}: {error.filename or place} cannot be written ({error.strerror or error}); "
            f"choose {choose}"
        ) from error
